//! What the task dump says of a task that waits in a call of several traps: it waits where the call was made, not in there.

use std::env::temp_dir;
use std::future::pending;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use kernel::channel::{self, Channel, Connection};
use kernel::fs::File;
use kernel::net::tls::{ClientConfig, ServerConfig, TlsStream, open_tls_connection};
use kernel::net::{
    Io, Server, Stream, TcpStream, UnixStream, open_connection, open_unix_connection, tcp_server,
    unix_server,
};
use kernel::process::Command;
use kernel::signal::{SIGUSR2, SignalEvent};
use kernel::sync::{Condition, Lock};
use kernel::{drop_after, spawn, timeout_after, wait_until_idle};
use rig::unique;

use super::{s, virtual_builder};
use crate::kernel_tls::Authority;

/// All sorts of things that keep a task waiting.
#[derive(Clone)]
struct Tedium {
    /// Nothing comes from it.
    silent: Rc<UnixStream>,
    /// Nothing goes into it.
    full: Rc<UnixStream>,
    /// Nothing comes from it.
    pipe: Rc<OwnedFd>,
    /// A server lets nobody in.
    busy: SocketAddr,
    busy_path: PathBuf,
    /// There is no server, and will be none.
    nobody: SocketAddr,
    /// A server may be there.
    free_path: PathBuf,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Tedium {
    fn file(&self) -> File {
        let pipe = self.pipe.try_clone().unwrap();
        std::fs::File::from(pipe).into()
    }

    fn silent(&self) -> UnixStream {
        Io::from_std(self.silent.as_std().try_clone().unwrap()).unwrap()
    }
}

/// Waits for a second, which is over when nothing else can happen.
async fn fill(stream: &UnixStream) {
    while timeout_after(s(1), stream.write(&[0; 65536])).await.is_ok() {}
}

/// Connects until nobody is let in any more; what it answers with has to be kept.
async fn crowd<S: 'static, F>(connect: impl Fn() -> F) -> Vec<S>
where
    F: Future<Output = std::io::Result<S>> + 'static,
{
    let mut crowd = Vec::new();
    while let Some(stream) = drop_after(s(1), connect()).await {
        crowd.push(stream.unwrap());
    }
    crowd
}

type Call = (
    &'static str,
    fn(Tedium) -> Pin<Box<dyn Future<Output = ()>>>,
);

/// Each call with its text.
macro_rules! calls {
    ($tedium:ident: $($call:expr),* $(,)?) => {
        [$((stringify!($call), |$tedium| Box::pin(async move { let _ = &$tedium; let _ = $call.await; }))),*]
    };
}

#[test]
fn a_task_that_waits_in_a_call_of_several_traps_waits_at_its_own_line() {
    let calls: &[Call] = &calls!(at:
        Stream::new(at.silent).read(&mut [0]),
        Stream::new(at.silent).read_exact(&mut [0]),
        Stream::new(at.silent).read_until(b'.', 100),
        Stream::new(at.silent).read_line(100),
        Stream::new(at.silent).read_to_end(100),
        Stream::new(at.full).write_all(b"x"),
        at.full.write_all(b"x"),
        Connection::new(at.silent).recv(100),
        Connection::new(at.silent).recv_into(&mut [0]),
        Connection::new(at.full).send(b"x"),
        Connection::new(at.silent).authenticate_client(b"key"),
        Connection::new(at.silent).authenticate_server(b"key"),
        Channel::bind("127.0.0.1:0").unwrap().accept(),
        channel::connect(at.nobody, None::<&str>),
        channel::connect(at.busy, None::<&str>),
        TlsStream::connect(at.silent(), at.client, "localhost"),
        TlsStream::accept(at.silent(), at.server),
        TcpStream::connect(at.busy),
        TcpStream::connect_from("127.0.0.1:0".parse().unwrap(), at.busy),
        UnixStream::connect(at.busy_path),
        open_connection(at.busy),
        open_unix_connection(at.busy_path),
        open_tls_connection(at.busy, at.client, None),
        tcp_server("127.0.0.1:0", async |_| Ok(())),
        unix_server(at.free_path, async |_| Ok(())),
        Server::new().tls(at.server).tcp("127.0.0.1:0", async |_| Ok(())),
        at.file().read(&mut [0]),
        at.file().read_to_end(),
        at.file().read_to_string(),
        at.file().read_line(),
        at.file().next_line(),
        at.file().lines(),
        Command::new("sleep").arg("600").output(b""),
        Command::new("sleep").arg("600").check_output(b""),
        Command::new("sleep").arg("600").spawn().unwrap().communicate(b""),
        Command::new("sleep").arg("600").kill_on_drop(true).spawn().unwrap().wait(),
        SignalEvent::new(&[SIGUSR2]).unwrap().wait(),
        Condition::new().wait_for(&mut Lock::new(0).acquire().await.unwrap(), |n| *n > 0),
        drop_after(s(9), pending::<()>()),
    );

    let kernel = virtual_builder().0.build();
    kernel
        .unwrap()
        .run(async {
            let (silent, _theirs) = UnixStream::pair().unwrap();
            let (full, _reader) = UnixStream::pair().unwrap();
            fill(&full).await;
            let (pipe, writer) = std::io::pipe().unwrap();
            let listener = Server::new().backlog(0).tcp_socket("127.0.0.1:0").unwrap();
            let busy = listener.local_addr().unwrap();
            let clients = crowd(|| TcpStream::connect(busy)).await;
            let [busy_path, free_path] = ["busy", "free"].map(|it| temp_dir().join(unique(it)));
            let _unix_listener = Server::new().backlog(0).unix_socket(&busy_path).unwrap();
            let path = busy_path.clone();
            let _unix = crowd(|| UnixStream::connect(path.clone())).await;
            let authority = Authority::new();
            let tedium = Tedium {
                silent: Rc::new(silent),
                full: Rc::new(full),
                pipe: Rc::new(pipe.into()),
                busy,
                busy_path,
                nobody: clients[0].local_addr().unwrap(),
                free_path,
                client: authority.client().build().unwrap(),
                server: authority.server().build().unwrap(),
            };
            for (text, call) in calls {
                let task = spawn(call(tedium.clone()));
                wait_until_idle().await.unwrap();
                let waits = task.info().expect("it waits for ever").waits;
                assert!(!waits.is_empty(), "{text}");
                for (kind, at) in waits {
                    assert_eq!(at.file(), file!(), "{text} waits for {kind:?} at {at}");
                }
                task.abort();
                let _there_was_none = std::fs::remove_file(&tedium.free_path);
            }
            // Which lets the threads go that wait for it.
            drop(writer);
            std::fs::remove_file(&tedium.busy_path).unwrap();
        })
        .unwrap();
}
