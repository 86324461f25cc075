//! `amqps` and the ways to log in.
//!
//! Most tests have TLS of our own in front of the broker under test, so that they can choose what it shows and asks for. Those whose names
//! begin with `rabbitmq_only` are about what just RabbitMQ has, TLS and EXTERNAL of its own; `tests/run` leaves them out elsewhere.

use std::env;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread;

use amqp::client::{self, Connection, Error, Message, Options, PublisherOptions};
use kernel::net::tls::ServerConfig;
use kernel::net::{Read, TcpListener, TcpStream, TlsStream, Write};
use kernel::{spawn, timeout_after};
use rig::{Broker, Olive, PATIENCE, Proxy, unique};

use crate::kernel_tls::Authority;

/// Listens with TLS and passes everything on to a broker: on a kernel and thread of its own, until the test process ends.
fn front(broker: SocketAddr, config: Arc<ServerConfig>) -> SocketAddr {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        kernel::run(async move {
            let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
            tell.send(listener.local_addr()?).expect("the test waits");
            loop {
                let (stream, _) = listener.accept().await?;
                spawn(relay(stream, Arc::clone(&config), broker));
            }
            #[expect(unreachable_code, reason = "names the type")]
            io::Result::Ok(())
        })
    });
    told.recv().expect("it can listen")
}

async fn relay(stream: TcpStream, config: Arc<ServerConfig>, broker: SocketAddr) -> io::Result<()> {
    let outside = Rc::new(TlsStream::accept(stream, config).await?);
    let inside = Rc::new(TcpStream::connect(broker).await?);
    let (from, to) = (Rc::clone(&outside), Rc::clone(&inside));
    let up = spawn(async move {
        let copied = copy(&*from, &*to).await;
        to.shutdown(std::net::Shutdown::Write)?;
        copied
    });
    copy(&*inside, &*outside).await?;
    outside.shutdown().await?;
    up.join().await.map_err(io::Error::other)?
}

async fn copy(from: &impl Read, to: &impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let mut rest = match from.read(&mut buffer).await? {
            0 => return Ok(()),
            n => &buffer[..n],
        };
        while !rest.is_empty() {
            rest = &rest[to.write(rest).await?..];
        }
        to.flush().await?;
    }
}

/// An `amqps` address whose options come from `query`.
fn amqps(host: &str, address: SocketAddr, query: &str) -> String {
    format!("amqps://guest:guest@{host}:{}/%2F?{query}", address.port())
}

fn run(body: impl Future<Output = Result<(), Error>>) {
    kernel::run(timeout_after(PATIENCE, body)).unwrap().unwrap();
}

/// A message, there and back again.
async fn echo(connection: &Connection, body: &[u8]) -> Result<(), Error> {
    let channel = connection.channel().await?;
    let queue = unique("tls");
    channel.queue(&queue).exclusive().declare().await?;
    let publisher = connection.publisher(PublisherOptions::default()).await?;
    publisher
        .send(Message::new(body).key(&queue).mandatory())
        .await?;
    let mut consumer = channel.consume(&queue).start().await?;
    let delivery = consumer.next().await?.expect("a message");
    assert!(delivery.body() == body, "another body came back");
    delivery.ack();
    Ok(())
}

/// Connecting has to fail, and to say so.
async fn refused(url: &str, expected: &[&str]) {
    let options = Options::default();
    let error = client::connect(url, options).await.unwrap_err().to_string();
    for part in expected {
        assert!(error.contains(part), "{part:?} is not in {error:?}");
    }
}

/// Accepts: feature/tls
#[test]
fn amqps_with_a_private_authority_carries_messages_of_any_size() {
    let broker = Broker::under_test();
    let authority = Authority::new();
    let [ca, ..] = authority.files(&[]);
    let address = front(broker.address(), authority.server().build().unwrap());
    run(async {
        let url = amqps(
            "localhost",
            address,
            &format!("cacertfile={}", ca.display()),
        );
        let connection = client::connect(&url, Options::default()).await?;
        for size in [0, 1, 4096, 3 << 20] {
            let body: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
            echo(&connection, &body).await?;
        }
        assert_eq!(connection.close(PATIENCE).await?.unconfirmed, 0);
        Ok(())
    });
}

/// Accepts: feature/tls
#[test]
fn a_certificate_for_another_name_or_of_a_stranger_is_refused_unless_told_otherwise() {
    let broker = Broker::under_test();
    let authority = Authority::new();
    let [ca, ..] = authority.files(&[]);
    let [other_ca, ..] = Authority::new().files(&[]);
    let address = front(broker.address(), authority.server().build().unwrap());
    run(async {
        let ours = format!("cacertfile={}", ca.display());
        let theirs = format!("cacertfile={}", other_ca.display());
        // It is for `localhost`; 127.0.0.1 is another name.
        refused(&amqps("127.0.0.1", address, &ours), &["127.0.0.1", "name"]).await;
        refused(&amqps("localhost", address, &theirs), &["UnknownIssuer"]).await;
        let named = format!("{ours}&server_name_indication=mq.example");
        refused(&amqps("localhost", address, &named), &["mq.example"]).await;

        for query in [
            format!("{ours}&server_name_indication=localhost"),
            format!("{ours}&server_name_indication=disable"),
            "verify=verify_none".to_owned(),
        ] {
            let url = amqps("127.0.0.1", address, &query);
            let connection = client::connect(&url, Options::default()).await?;
            echo(&connection, b"x").await?;
        }
        let unnamed = format!("{theirs}&server_name_indication=disable");
        refused(&amqps("localhost", address, &unnamed), &["UnknownIssuer"]).await;
        Ok(())
    });
}

/// Accepts: feature/tls
#[test]
fn a_server_that_asks_for_a_certificate_gets_the_clients() {
    let broker = Broker::under_test();
    let authority = Authority::new();
    let [ca, cert, key] = authority.files(&["client"]);
    let [_, strange_cert, strange_key] = Authority::new().files(&["stranger"]);
    let server = authority.server().trust_file(&ca).unwrap();
    let address = front(broker.address(), server.build().unwrap());
    run(async {
        let with = |cert: &Path, key: &Path| {
            let (ca, cert, key) = (ca.display(), cert.display(), key.display());
            let query = format!("cacertfile={ca}&certfile={cert}&keyfile={key}");
            amqps("localhost", address, &query)
        };
        let connection = client::connect(&with(&cert, &key), Options::default()).await?;
        echo(&connection, b"x").await?;

        let query = format!("cacertfile={}", ca.display());
        refused(
            &amqps("localhost", address, &query),
            &["CertificateRequired"],
        )
        .await;
        refused(&with(&strange_cert, &strange_key), &["TLS with localhost"]).await;
        let missing = Path::new("/nowhere/cert.pem");
        refused(
            &with(missing, &key),
            &["cannot prepare TLS", "/nowhere/cert.pem"],
        )
        .await;
        refused(&with(&cert, &strange_key), &["cannot prepare TLS"]).await;
        Ok(())
    });
}

#[test]
fn a_configuration_of_ones_own_takes_the_place_of_files() {
    let broker = Broker::under_test();
    let authority = Authority::new();
    let address = front(broker.address(), authority.server().build().unwrap());
    run(async {
        let tls = Some(authority.client().build().unwrap().into());
        let options = Options {
            tls,
            ..Options::default()
        };
        let connection = client::connect(&amqps("localhost", address, ""), options).await?;
        echo(&connection, b"x").await
    });
}

#[test]
fn a_connection_with_tls_that_is_cut_is_made_again() {
    let broker = Broker::under_test();
    let authority = Authority::new();
    let [ca, ..] = authority.files(&[]);
    let proxy = Proxy::to(front(broker.address(), authority.server().build().unwrap()));
    run(async {
        let query = format!("cacertfile={}", ca.display());
        let url = amqps("localhost", proxy.address(), &query);
        let connection = client::connect(&url, Options::default()).await?;
        echo(&connection, b"before").await?;
        proxy.reset();
        let mut events = connection.events();
        while !matches!(
            events.next().await?,
            Some(client::ConnectionEvent::Recovered { .. })
        ) {}
        echo(&connection, b"after").await
    });
}

#[test]
fn amqps_to_a_server_without_tls_says_what_it_met() {
    let broker = Broker::under_test();
    run(async {
        let url = amqps("localhost", broker.address(), "verify=verify_none");
        refused(&url, &["TLS with localhost"]).await;
        Ok(())
    });
}

#[test]
fn olive_works_through_amqps() {
    let broker = Broker::under_test();
    let authority = Authority::new();
    let [ca, ..] = authority.files(&[]);
    let address = front(broker.address(), authority.server().build().unwrap());
    let url = amqps(
        "localhost",
        address,
        &format!("cacertfile={}", ca.display()),
    );
    let olive = Olive::on(&broker).at(&url).with_python_workers(1);
    let _worker = olive.run();
    let ended = olive.call(&["submit", "jobs.add", "40", "--kw", "b=2", "--wait"]);
    assert_eq!(ended.expect_code(0).stdout, "42\n");
}

/// Accepts: feature/auth
#[test]
fn each_mechanism_for_passwords_logs_in_and_refuses_a_wrong_one() {
    let broker = Broker::under_test();
    run(async {
        for query in ["", "?auth_mechanism=PLAIN", "?auth_mechanism=amqplain"] {
            let url = format!("{}{query}", broker.url());
            let connection = client::connect(&url, Options::default()).await?;
            echo(&connection, b"x").await?;
            let url = format!("{}{query}", broker.url_with_wrong_password());
            let error = client::connect(&url, Options::default()).await.unwrap_err();
            assert!(matches!(error, Error::LoginRefused { .. }), "{error}");
        }
        let url = format!("{}?auth_mechanism=EXTERNAL", broker.url());
        let expected = ["does not offer the mechanism EXTERNAL", "AMQPLAIN"];
        refused(&url, &expected).await;
        Ok(())
    });
}

/// RabbitMQ's own TLS: its address, and the folder of certificates that `tests/run` has made.
fn rabbitmq() -> (SocketAddr, String) {
    let told = |name| env::var(name).unwrap_or_else(|_| panic!("{name}: use tests/run"));
    let address = told("SWEEPEA_TEST_BROKER_TLS");
    (address.parse().unwrap(), told("SWEEPEA_TEST_CERTIFICATES"))
}

/// Accepts: feature/tls, feature/auth
#[test]
fn rabbitmq_only_the_certificate_is_the_login() {
    let (address, folder) = rabbitmq();
    run(async {
        let query = format!(
            "cacertfile={folder}/ca.pem&certfile={folder}/guest.pem&keyfile={folder}/guest-key.pem"
        );
        let url = format!(
            "amqps://localhost:{}/%2F?auth_mechanism=EXTERNAL&{query}",
            address.port()
        );
        let connection = client::connect(&url, Options::default()).await?;
        echo(&connection, &vec![7; 1 << 20]).await?;
        let _ = connection.close(PATIENCE).await?;

        // Whose certificate names no user of the broker's.
        let query = format!(
            "cacertfile={folder}/ca.pem&certfile={folder}/nobody.pem&keyfile={folder}/nobody-key.pem"
        );
        let url = amqps(
            "localhost",
            address,
            &format!("auth_mechanism=EXTERNAL&{query}"),
        );
        let error = client::connect(&url, Options::default()).await.unwrap_err();
        assert!(matches!(error, Error::LoginRefused { .. }), "{error}");
        // It has a password for those who show no certificate.
        let url = amqps("localhost", address, &format!("cacertfile={folder}/ca.pem"));
        echo(&client::connect(&url, Options::default()).await?, b"x").await
    });
}

/// Accepts: feature/tls
#[test]
fn rabbitmq_only_its_certificate_is_looked_at() {
    let (address, folder) = rabbitmq();
    let [stranger, ..] = Authority::new().files(&[]);
    run(async {
        let ours = format!("cacertfile={folder}/ca.pem");
        let named = format!("{ours}&server_name_indication=mq.example");
        refused(&amqps("localhost", address, &named), &["mq.example"]).await;
        let theirs = format!("cacertfile={}", stranger.display());
        refused(&amqps("localhost", address, &theirs), &["UnknownIssuer"]).await;
        let url = amqps("127.0.0.1", address, &ours);
        echo(&client::connect(&url, Options::default()).await?, b"x").await
    });
}
