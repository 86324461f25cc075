//! An echo server: `cargo run -p sweepea-kernel --example echo -- 127.0.0.1:7000`, then `nc 127.0.0.1 7000`. Ends with Ctrl-C.

use std::io;
use std::rc::Rc;

use kernel::net::{TcpListener, TcpStream};
use kernel::signal::{SIGINT, SIGTERM, SignalQueue};
use kernel::spawn;

async fn echo(client: TcpStream) -> io::Result<()> {
    let mut buf = [0; 16 * 1024];
    loop {
        match client.read(&mut buf).await? {
            0 => return Ok(()),
            read => client.write_all(&buf[..read]).await?,
        }
    }
}

async fn serve(listener: Rc<TcpListener>) -> io::Result<()> {
    loop {
        let (client, peer) = listener.accept().await?;
        client.set_nodelay(true)?;
        spawn(async move {
            if let Err(error) = echo(client).await {
                eprintln!("{peer}: {error}");
            }
        });
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "127.0.0.1:0".into());
    kernel::run(async {
        let listener = Rc::new(TcpListener::bind(address)?);
        println!("listening on {}", listener.local_addr()?);
        let signals = SignalQueue::new(&[SIGINT, SIGTERM])?;
        let server = spawn(serve(listener));
        signals.next().await?;
        server.cancel().await?;
        Ok(())
    })?
}
