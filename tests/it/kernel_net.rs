//! Servers, connections by name, the resolver, and connections as files. Loopback only.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

use kernel::net::{
    IntoStdError, Io, Server, Stream, TcpListener, TcpStream, UnixStream, open_connection,
    open_unix_connection, resolve, tcp_server, tcp_server_socket, unix_server,
};
use kernel::sync::Event;
use kernel::{
    Builder, Interrupt, MaybeInterrupt, Task, VirtualClock, run_in_thread, sleep, spawn,
    timeout_after, yield_now,
};
use rig::unique;

use crate::kernel_core::logged::lines_of;

const SECOND: Duration = Duration::from_secs(1);
const LIMIT: usize = 1 << 20;

/// Runs `main` in real time; a test that hangs fails after a while.
fn run<T>(main: impl Future<Output = io::Result<T>>) -> T {
    kernel::run(timeout_after(60 * SECOND, main))
        .unwrap()
        .unwrap()
}

/// Runs `main` in virtual time: when nothing happens, the next deadline comes at once.
fn run_virtual<T>(main: impl Future<Output = io::Result<T>>) -> T {
    let mut kernel = Builder::new().clock(VirtualClock::new()).build().unwrap();
    kernel.run(main).unwrap().unwrap()
}

/// Lets every other task run until it waits.
async fn settle() {
    for _ in 0..5 {
        yield_now().await.unwrap();
    }
}

fn is_timeout<T, E: MaybeInterrupt>(outcome: &Result<T, E>) -> bool {
    matches!(outcome, Err(error) if error.interrupt() == Some(&Interrupt::TaskTimeout))
}

type Serving = Task<io::Result<Infallible>>;

/// Serves on any free port.
fn serve<H>(server: Server, handler: H) -> io::Result<(SocketAddr, Serving)>
where
    H: AsyncFn(TcpStream) -> io::Result<()> + 'static,
{
    let listener = server.tcp_socket("127.0.0.1:0")?;
    Ok((listener.local_addr()?, spawn(server.run(listener, handler))))
}

async fn echo<S: kernel::net::Read + kernel::net::Write>(client: S) -> io::Result<()> {
    let mut client = Stream::new(client);
    let mut buf = [0; 100];
    loop {
        match client.read(&mut buf).await? {
            0 => return Ok(()),
            read => client.write_all(&buf[..read]).await?,
        }
    }
}

/// Accepts: curio/network/tcp_echo
#[test]
fn a_cancelled_server_cancels_its_clients_and_waits_for_them() {
    run(async {
        let farewells = Rc::new(Cell::new(0));
        let (address, server) = serve(Server::new(), {
            let farewells = farewells.clone();
            async move |client| {
                let outcome = echo(client).await;
                // Clean-up may block; the server waits for it.
                sleep(Duration::from_millis(1)).await?;
                farewells.set(farewells.get() + 1);
                outcome
            }
        })?;
        let mut clients = Vec::new();
        for word in [b"first\n", b"other\n"] {
            let mut client = open_connection(address).await?;
            client.write_all(word).await?;
            assert_eq!(client.read_line(LIMIT).await?, word);
            clients.push(client);
        }
        server.cancel().await?;
        assert_eq!(farewells.get(), 2);
        let stopped = server.join().await.unwrap().unwrap_err();
        assert_eq!(stopped.interrupt(), Some(&Interrupt::cancelled()));
        for mut client in clients {
            assert_eq!(client.read_to_end(LIMIT).await?, b"");
        }
        let refused = open_connection(address).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        Ok(())
    });
}

/// Accepts: curio/network/unix_echo
#[test]
fn a_unix_server_serves_several_clients_at_once() {
    let path = std::env::temp_dir().join(unique("kernel-net"));
    run(async {
        let server = spawn(unix_server(path.clone(), echo));
        settle().await;
        let mut clients = Vec::new();
        for _ in 0..3 {
            clients.push(open_unix_connection(&path).await?);
        }
        for client in clients.iter_mut().rev() {
            client.write_all(b"hello\n").await?;
            assert_eq!(client.read_line(LIMIT).await?, b"hello\n");
        }
        server.cancel().await?;
        assert_eq!(clients[0].read_to_end(LIMIT).await?, b"");
        Ok(())
    });
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_server_that_is_dropped_cancels_its_clients() {
    run(async {
        let (address, server) = serve(Server::new(), echo)?;
        let mut client = open_connection(address).await?;
        client.write_all(b"hello\n").await?;
        assert_eq!(client.read_line(LIMIT).await?, b"hello\n");
        server.abort();
        assert_eq!(client.read_to_end(LIMIT).await?, b"");
        Ok(())
    });
}

#[test]
fn clients_above_the_bound_wait_until_one_goes() {
    run_virtual(async {
        let (address, _server) = serve(Server::new().max_clients(2), async |client| {
            client.write_all(b"welcome\n").await?;
            echo(client).await
        })?;
        let mut clients = Vec::new();
        for _ in 0..4 {
            clients.push(open_connection(address).await?);
        }
        let [first, second, third, fourth] = &mut clients[..] else {
            unreachable!()
        };
        for client in [&mut *first, second] {
            assert_eq!(client.read_line(LIMIT).await?, b"welcome\n");
        }
        let waiting = timeout_after(SECOND, third.read_line(LIMIT)).await;
        assert!(is_timeout(&waiting), "{waiting:?}");
        first.get_ref().shutdown(std::net::Shutdown::Write)?;
        assert_eq!(third.read_line(LIMIT).await?, b"welcome\n");
        let waiting = timeout_after(SECOND, fourth.read_line(LIMIT)).await;
        assert!(is_timeout(&waiting), "{waiting:?}");
        Ok(())
    });
}

#[test]
fn a_handler_that_fails_or_panics_is_reported_and_ends_its_own_client_alone() {
    let mut reports = Vec::new();
    let logged = lines_of(log::Level::Warn, || {
        run(async {
            let (address, server) = serve(Server::new(), async |client| {
                let mut client = Stream::new(client);
                let line = client.read_line(LIMIT).await?;
                match &line[..] {
                    b"fail\n" => Err(io::Error::other("as asked")),
                    b"panic\n" => panic!("as asked, too"),
                    _ => Ok(client.write_all(&line).await?),
                }
            })?;
            let mut other = open_connection(address).await?;
            for (line, report) in [
                ("fail\n", "as asked"),
                ("panic\n", "task panicked: as asked, too"),
            ] {
                let mut client = open_connection(address).await?;
                let local = client.get_ref().local_addr()?;
                reports.push(format!("client {local}: {report}"));
                client.write_all(line.as_bytes()).await?;
                assert_eq!(client.read_to_end(LIMIT).await?, b"");
            }
            other.write_all(b"still there\n").await?;
            assert_eq!(other.read_line(LIMIT).await?, b"still there\n");
            assert!(!server.is_terminated());
            Ok(())
        });
    });
    for report in reports {
        let count = logged.iter().filter(|line| line.ends_with(&report));
        assert_eq!(count.count(), 1, "{report}: {logged:#?}");
    }
}

#[test]
fn a_listener_that_fails_ends_the_server_and_its_clients() {
    run(async {
        let listener = tcp_server_socket("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let same = listener.as_fd().try_clone_to_owned()?;
        let server = spawn(Server::new().run(listener, echo));
        let mut client = open_connection(address).await?;
        client.write_all(b"hello\n").await?;
        assert_eq!(client.read_line(LIMIT).await?, b"hello\n");
        rustix::net::shutdown(&same, rustix::net::Shutdown::Both)?;
        let failed = server.join().await.unwrap().unwrap_err();
        assert_eq!(failed.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(client.read_to_end(LIMIT).await?, b"");
        Ok(())
    });
}

/// Runs in a process of its own, see below.
#[test]
#[ignore = "uses up all descriptors of its process"]
fn server_without_descriptors() {
    run_virtual(async {
        let (address, server) = serve(Server::new(), echo)?;
        // Both ends of a connection are in this process; the client's takes the last descriptor.
        let mut hoard = Vec::new();
        while let Ok(file) = std::fs::File::open("/dev/null") {
            hoard.push(file);
        }
        drop(hoard.pop());
        let mut client = open_connection(address).await?;
        client.write_all(b"hello\n").await?;
        let cycles = server.cycles();
        let unserved = timeout_after(60 * SECOND, client.read_line(LIMIT)).await;
        assert!(is_timeout(&unserved), "{unserved:?}");
        // About one attempt a second.
        let attempts = server.cycles() - cycles;
        assert!((10..200).contains(&attempts), "{attempts} attempts");
        hoard.clear();
        assert_eq!(client.read_line(LIMIT).await?, b"hello\n");
        Ok(())
    });
}

#[test]
fn a_server_without_descriptors_pauses_and_goes_on() {
    let test = "kernel_net::server_without_descriptors --ignored --exact";
    let mut child = std::process::Command::new("sh");
    child.args(["-c", &format!("ulimit -n 64; exec \"$0\" {test}")]);
    let output = child
        .arg(std::env::current_exe().unwrap())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}"
    );
}

/// Accepts: curio/network/errors
#[test]
fn an_address_that_cannot_be_had_is_named_by_the_error() {
    run(async {
        let taken = tcp_server_socket("127.0.0.1:0")?;
        let address = taken.local_addr()?;
        let error = tcp_server(address, echo).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains(&address.to_string()), "{error}");

        let path = std::env::temp_dir()
            .join(unique("no-such-folder"))
            .join("x");
        let error = unix_server(&path, echo).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(
            error.to_string().contains(path.to_str().unwrap()),
            "{error}"
        );
        let error = open_unix_connection(&path).await.unwrap_err();
        assert!(
            error.to_string().contains(path.to_str().unwrap()),
            "{error}"
        );

        let error = open_connection("no port").await.unwrap_err();
        assert!(error.to_string().contains("no port"), "{error}");
        let error = open_connection("host.invalid:1").await.unwrap_err();
        assert!(error.to_string().contains("host.invalid:1"), "{error}");
        Ok(())
    });
}

#[test]
fn options_reach_the_socket() {
    run_virtual(async {
        let shared = Server::new().reuse_port(true);
        let first = shared.tcp_socket("127.0.0.1:0")?;
        let address = first.local_addr()?;
        shared.tcp_socket(address)?;
        let refused = Server::new().tcp_socket(address).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);

        // One connection that nobody accepts fits, and, on Linux, one more.
        let small = Server::new().backlog(1).tcp_socket("127.0.0.1:0")?;
        let mut clients = Vec::new();
        let full: io::Result<()> = timeout_after(SECOND, async {
            for _ in 0..10 {
                clients.push(TcpStream::connect(small.local_addr()?).await?);
            }
            Ok(())
        })
        .await;
        assert!(is_timeout(&full), "{} connected", clients.len());
        assert!(
            (1..=3).contains(&clients.len()),
            "{} connected",
            clients.len()
        );
        Ok(())
    });
}

/// Accepts: curio/socket/socket_funcs
#[test]
fn the_resolver_answers_from_a_thread_while_others_run() {
    run(async {
        let ticks = Rc::new(Cell::new(0));
        let _ticking = spawn({
            let ticks = ticks.clone();
            async move {
                loop {
                    ticks.set(ticks.get() + 1);
                    yield_now().await?;
                }
                #[expect(unreachable_code)]
                Ok::<_, Interrupt>(())
            }
        });
        let localhost = resolve::gethostbyname("localhost").await?;
        assert!(localhost.iter().all(|address| address.is_loopback()));
        assert!(!localhost.is_empty() && ticks.get() > 0);

        let found = resolve::getaddrinfo(Some("127.0.0.1"), Some("8080")).await?;
        assert_eq!(found, ["127.0.0.1:8080".parse().unwrap()]);
        let wildcard = resolve::getaddrinfo(None, Some("80")).await?;
        assert!(wildcard.iter().all(|address| address.port() == 80));

        let address: SocketAddr = "127.0.0.1:9".parse().unwrap();
        let (host, service) = resolve::getnameinfo(address).await?;
        assert_eq!(host, resolve::gethostbyaddr(address.ip()).await?);
        assert!(service == "discard" || service == "9", "{service}");

        let uname = std::process::Command::new("uname").arg("-n").output()?;
        let own = resolve::gethostname();
        assert_eq!(own.as_bytes(), uname.stdout.trim_ascii());
        assert!(!resolve::getfqdn(&own).await?.is_empty());
        assert_eq!(resolve::getfqdn("host.invalid").await?, "host.invalid");

        let unknown = resolve::gethostbyname("host.invalid").await.unwrap_err();
        assert!(unknown.to_string().contains("host.invalid"), "{unknown}");
        let unknown = resolve::getaddrinfo(Some("127.0.0.1"), Some("no such")).await;
        assert!(
            unknown
                .unwrap_err()
                .to_string()
                .contains("127.0.0.1:no such")
        );
        Ok(())
    });
}

#[test]
fn a_look_up_can_be_interrupted() {
    run(async {
        let look_up = spawn(async { resolve::gethostbyname("localhost").await });
        look_up.request_cancel("changed my mind");
        let outcome = look_up.join().await.unwrap();
        assert!(outcome.unwrap_err().interrupt().is_some());
        Ok(())
    });
}

async fn tcp_pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let client = TcpStream::connect(listener.local_addr()?).await?;
    Ok((client, listener.accept().await?.0))
}

/// Accepts: curio/socket/tcp_file_echo
#[test]
fn an_echo_through_files_that_share_their_connection() {
    run(async {
        let log = Rc::new(RefCell::new(Vec::new()));
        let (address, _server) = serve(Server::new(), {
            let log = log.clone();
            async move |client| {
                // One to read, one to write, and the connection itself is not needed any more.
                let (mut input, output) = (client.make_file()?, client.make_file()?);
                drop(client);
                loop {
                    let line = input.read_line(LIMIT).await?;
                    log.borrow_mut()
                        .push(String::from_utf8(line.clone()).unwrap());
                    if line.is_empty() {
                        return Ok(());
                    }
                    output.write_all(&line).await?;
                }
            }
        })?;
        let client = TcpStream::connect(address).await?;
        let mut file = client.make_file()?;
        for word in ["hello\n", "again\n"] {
            file.write_all(word.as_bytes()).await?;
            assert_eq!(file.read_line(LIMIT).await?, word.as_bytes());
        }
        drop(file);
        // The connection outlives the file.
        client.write_all(b"directly\n").await?;
        let mut answer = [0; 100];
        assert_eq!(client.read(&mut answer).await?, 9);
        client.shutdown(std::net::Shutdown::Write)?;
        assert_eq!(client.read(&mut answer).await?, 0);
        assert_eq!(log.take(), ["hello\n", "again\n", "directly\n", ""]);
        Ok(())
    });
}

/// Accepts: curio/socket/buffer_makefile_into
#[test]
fn four_megabytes_through_a_file_fill_the_callers_buffer() {
    run(async {
        let (ours, theirs) = tcp_pair().await?;
        let sent: Vec<u8> = (0..4 << 20).map(|i: u32| (i % 251) as u8).collect();
        let writer = spawn({
            let sent = sent.clone();
            async move {
                let file = theirs.make_file()?;
                file.write_all(b"header\n").await?;
                io::Result::Ok(file.write_all(&sent).await?)
            }
        });
        let mut file = ours.make_file()?;
        assert_eq!(file.read_line(LIMIT).await?, b"header\n");
        let mut received = vec![0; sent.len()];
        let mut done = 0;
        while done < received.len() {
            let read = file.read(&mut received[done..]).await?;
            assert!(read > 0, "ended after {done}");
            done += read;
        }
        assert!(received == sent);
        writer.join().await.unwrap()?;
        drop(ours);
        assert_eq!(file.read(&mut received).await?, 0);
        Ok(())
    });
}

/// Accepts: curio/io/filestream_blocking
#[test]
fn a_file_is_lent_to_a_thread_and_given_back() {
    run(async {
        let (ours, theirs) = tcp_pair().await?;
        let mut file = ours.make_file()?;
        drop(ours);
        theirs.write_all(b"line\n").await?;
        assert_eq!(file.read_line(LIMIT).await?, b"line\n");
        let mut lent = file.into_std()?;
        let reading = spawn(run_in_thread(move || {
            let mut buf = [0; 5];
            // It blocks until there is something: nothing was sent yet.
            let outcome = lent
                .read_exact(&mut buf)
                .and_then(|()| lent.write_all(&buf));
            outcome.map(|()| lent)
        }));
        settle().await;
        theirs.write_all(b"hello").await?;
        let mut echoed = [0; 5];
        Stream::new(&theirs).read_exact(&mut echoed).await?;
        assert_eq!(&echoed, b"hello");
        let returned = reading.join().await.unwrap()??;
        let mut file = Stream::new(Io::from_std(returned)?);
        theirs.write_all(b"again\n").await?;
        assert_eq!(file.read_line(LIMIT).await?, b"again\n");
        Ok(())
    });
}

/// Accepts: curio/io/filestream_bad_blocking
#[test]
fn a_file_with_something_in_its_buffer_is_not_lent() {
    run(async {
        let (ours, theirs) = UnixStream::pair()?;
        let mut file = ours.make_file()?;
        theirs.write_all(b"line\nrest\n").await?;
        file.read_line(LIMIT).await?;
        let mut file = match file.into_std() {
            Err(refused @ IntoStdError::Buffered(_)) => {
                assert!(refused.to_string().contains("5 bytes"), "{refused}");
                let IntoStdError::Buffered(file) = refused else {
                    unreachable!()
                };
                file
            }
            outcome => panic!("{outcome:?}"),
        };
        // Nothing was lost, and it still does not block.
        assert_eq!(file.read_line(LIMIT).await?, b"rest\n");
        let late = timeout_after(SECOND / 100, file.read_line(LIMIT)).await;
        assert!(is_timeout(&late));
        file.into_std()?;
        Ok(())
    });
}

#[test]
fn a_server_that_waits_for_clients_is_not_polled() {
    run_virtual(async {
        let ready = Rc::new(Event::new());
        let (address, server) = serve(Server::new(), {
            let ready = ready.clone();
            async move |client| {
                ready.set();
                echo(client).await
            }
        })?;
        let _client = TcpStream::connect(address).await?;
        ready.wait().await?;
        settle().await;
        let cycles = server.cycles();
        sleep(3600 * SECOND).await?;
        assert_eq!(server.cycles(), cycles);
        Ok(())
    });
}
