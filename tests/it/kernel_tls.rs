//! TLS over TCP and Unix sockets: against itself, against a wire that cuts, delays and forges, and against Python's `ssl`.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net as unix;
use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join;
use futures::io::{AsyncReadExt, AsyncWriteExt, copy};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, client, server};
use kernel::net::hyper::{KernelExecutor, KernelTimer};
use kernel::net::tls::rustls::crypto::ring::sign::any_supported_type;
use kernel::net::tls::rustls::server::{ClientHello, ResolvesServerCert};
use kernel::net::tls::rustls::sign::CertifiedKey;
use kernel::net::tls::rustls::{self, AlertDescription, CertificateError, ProtocolVersion};
use kernel::net::tls::{
    ClientConfig, ClientContext, Identity, ServerConfig, ServerContext, TlsError,
    open_tls_connection, open_unix_tls_connection, read_certificates, read_private_key,
};
use kernel::net::{Io, Polled, Server, Stream, TcpListener, TcpStream, TlsStream, UnixStream};
use kernel::{
    Builder, Interrupt, MaybeInterrupt, VirtualClock, drop_after, sleep, spawn, timeout_after,
    yield_now,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rig::{Process, unique};

use crate::kernel_core::logged::lines_of;

const SECOND: Duration = Duration::from_secs(1);
const LIMIT: usize = 1 << 24;

/// Runs `main` in real time; a test that hangs fails after a while.
fn run<T>(main: impl Future<Output = io::Result<T>>) -> T {
    kernel::run(timeout_after(60 * SECOND, main))
        .unwrap()
        .unwrap()
}

/// Runs `main` in virtual time: when nothing happens, the next deadline comes at once. To sleep is to let everything happen that can.
fn run_virtual<T>(main: impl Future<Output = io::Result<T>>) -> T {
    let mut kernel = Builder::new().clock(VirtualClock::new()).build().unwrap();
    kernel.run(main).unwrap().unwrap()
}

fn is_timeout<T, E: MaybeInterrupt>(outcome: &Result<T, E>) -> bool {
    matches!(outcome, Err(error) if error.interrupt() == Some(&Interrupt::TaskTimeout))
}

/// What rustls had to say, if that is what the error is about.
fn reason(error: &io::Error) -> Option<&rustls::Error> {
    Some(error.get_ref()?.downcast_ref::<TlsError>()?.reason())
}

/// A certificate authority of our own.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, unique("authority"));
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    fn issue(&self, names: &[&str]) -> (rcgen::Certificate, KeyPair) {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(names)
            .unwrap()
            .signed_by(&key, &self.0);
        (certificate.unwrap(), key)
    }

    fn identity(&self, names: &[&str]) -> Identity {
        let (certificate, key) = self.issue(names);
        Identity::new(vec![certificate.der().clone()], key.into())
    }

    /// Clients that trust it.
    pub(crate) fn client(&self) -> ClientContext {
        ClientContext::new().trust(self.0.der().clone()).unwrap()
    }

    /// A server that it calls `localhost`.
    pub(crate) fn server(&self) -> ServerContext {
        ServerContext::new(self.identity(&["localhost"]))
    }

    fn configs(&self) -> (Arc<ClientConfig>, Arc<ServerConfig>) {
        (
            self.client().build().unwrap(),
            self.server().build().unwrap(),
        )
    }

    /// The same as files, which are left to the folder for temporary ones.
    pub(crate) fn files(&self, names: &[&str]) -> [PathBuf; 3] {
        let (certificate, key) = self.issue(names);
        let stem = unique("kernel-tls");
        let texts = [self.0.pem(), certificate.pem(), key.serialize_pem()];
        let mut endings = ["ca", "cert", "key"].into_iter();
        texts.map(|text| {
            let file = format!("{stem}-{}.pem", endings.next().unwrap());
            let path = std::env::temp_dir().join(file);
            std::fs::write(&path, text).unwrap();
            path
        })
    }
}

type Unix = TlsStream<UnixStream>;

/// Both ends of the handshake.
async fn shake_hands(
    (ours, theirs): (UnixStream, UnixStream),
    (client, server): (Arc<ClientConfig>, Arc<ServerConfig>),
) -> (io::Result<Unix>, io::Result<Unix>) {
    let accepting = spawn(TlsStream::accept(theirs, server));
    let client = TlsStream::connect(ours, client, "localhost").await;
    (client, accepting.join().await.unwrap())
}

async fn tls_pair() -> io::Result<(Unix, Unix)> {
    let (client, server) = shake_hands(UnixStream::pair()?, Authority::new().configs()).await;
    Ok((client?, server?))
}

/// A wire between server and client, which can hold what the server sends.
struct Tap {
    is_holding: Cell<bool>,
    held: RefCell<Vec<u8>>,
    to_client: Rc<UnixStream>,
}

impl Tap {
    /// What the server sends from now on goes nowhere by itself.
    fn hold(&self) {
        self.is_holding.set(true);
    }

    async fn held(&self) -> io::Result<Vec<u8>> {
        sleep(SECOND / 1000).await?;
        Ok(self.held.take())
    }
}

/// The ends of the wire, and the wire.
fn tapped() -> io::Result<((UnixStream, UnixStream), Rc<Tap>)> {
    let (client, near) = UnixStream::pair()?;
    let (far, server) = UnixStream::pair()?;
    let (near, far) = (Rc::new(near), Rc::new(far));
    let tap = Rc::new(Tap {
        is_holding: Cell::new(false),
        held: RefCell::default(),
        to_client: Rc::clone(&near),
    });
    spawn({
        let far = Rc::clone(&far);
        async move {
            let mut buf = [0; 4096];
            while let Ok(read @ 1..) = near.read(&mut buf).await {
                far.write_all(&buf[..read]).await?;
            }
            far.shutdown(Shutdown::Write)
        }
    });
    spawn({
        let tap = Rc::clone(&tap);
        async move {
            let mut buf = [0; 4096];
            while let Ok(read @ 1..) = far.read(&mut buf).await {
                if tap.is_holding.get() {
                    tap.held.borrow_mut().extend(&buf[..read]);
                } else {
                    tap.to_client.write_all(&buf[..read]).await?;
                }
            }
            tap.to_client.shutdown(Shutdown::Write)
        }
    });
    Ok(((client, server), tap))
}

async fn tapped_pair() -> io::Result<(Unix, Unix, Rc<Tap>)> {
    let (ends, tap) = tapped()?;
    let (client, server) = shake_hands(ends, Authority::new().configs()).await;
    // The server's session tickets are still on their way.
    sleep(SECOND).await?;
    Ok((client?, server?, tap))
}

async fn read_some(stream: &Unix) -> io::Result<Vec<u8>> {
    let mut buf = [0; 1000];
    let read = stream.read(&mut buf).await?;
    Ok(buf[..read].to_vec())
}

fn numbers(count: u32) -> Vec<u8> {
    (0..count).map(|i| (i % 251) as u8).collect()
}

/// Accepts: curio/network/ssl_server
#[test]
fn a_server_speaks_tls_with_each_of_its_clients() {
    run(async {
        let (client, server) = Authority::new().configs();
        let server = Server::new().tls(server);
        let listener = server.tcp_socket("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let serving = spawn(server.run(listener, async |client| {
            assert_eq!(client.server_name().as_deref(), Some("localhost"));
            let mut client = Stream::new(client);
            loop {
                let line = client.read_line(LIMIT).await?;
                if line.is_empty() {
                    return client.into_parts().0.close().await;
                }
                client.write_all(&line).await?;
            }
        }));
        let address = format!("localhost:{port}");
        let mut polite = open_tls_connection(&address[..], client.clone(), None).await?;
        let mut other = open_tls_connection(&address[..], client, None).await?;
        for stream in [&mut polite, &mut other] {
            stream.write_all(b"hello\n").await?;
            assert_eq!(stream.read_line(LIMIT).await?, b"hello\n");
        }
        polite.get_ref().shutdown().await?;
        assert_eq!(polite.read_to_end(LIMIT).await?, b"");
        serving.cancel().await?;
        // The other's handler was ended half-way, and nobody said that all was said.
        let cut = other.read_to_end(LIMIT).await.unwrap_err();
        assert_eq!(cut.error.kind(), io::ErrorKind::UnexpectedEof);
        Ok(())
    });
}

/// Accepts: curio/network/unix_ssl_server
#[test]
fn a_unix_server_speaks_tls() {
    let path = std::env::temp_dir().join(unique("kernel-tls"));
    run(async {
        let (client, server) = Authority::new().configs();
        let server = Server::new().tls(server);
        let listener = server.unix_socket(&path)?;
        let serving = spawn(server.run(listener, async |client| {
            let mut client = Stream::new(client);
            let line = client.read_line(LIMIT).await?;
            client.write_all(&line).await?;
            client.into_parts().0.close().await
        }));
        let mut stream = open_unix_tls_connection(&path, client.clone(), "localhost").await?;
        stream.write_all(b"hello\n").await?;
        assert_eq!(stream.read_to_end(LIMIT).await?, b"hello\n");
        let refused = open_unix_tls_connection(&path, client, "elsewhere")
            .await
            .unwrap_err();
        assert!(refused.to_string().contains("elsewhere"), "{refused}");
        serving.cancel().await?;
        Ok(())
    });
    std::fs::remove_file(&path).unwrap();
}

/// Accepts: curio/network/ssl_wrapping
#[test]
fn configurations_of_ours_and_of_rustls_do_alike() {
    run_virtual(async {
        let authority = Authority::new();
        let (our_client, our_server) = authority.configs();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(authority.0.der().clone()).unwrap();
        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS12])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let (certificate, key) = authority.issue(&["localhost"]);
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(rustls::ALL_VERSIONS)
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key.into())
            .unwrap();
        let (client, server) = (Arc::new(client), Arc::new(server));
        for (client, server, version) in [
            (&our_client, &our_server, ProtocolVersion::TLSv1_3),
            (&our_client, &server, ProtocolVersion::TLSv1_3),
            (&client, &our_server, ProtocolVersion::TLSv1_2),
            (&client, &server, ProtocolVersion::TLSv1_2),
        ] {
            let configs = (client.clone(), server.clone());
            let (client, server) = shake_hands(UnixStream::pair()?, configs).await;
            let (client, server) = (client?, server?);
            assert_eq!(client.inspect(|tls| tls.protocol_version()), Some(version));
            client.write_all(b"there").await?;
            assert_eq!(read_some(&server).await?, b"there");
            server.write_all(b"and back").await?;
            assert_eq!(read_some(&client).await?, b"and back");
            client.close().await?;
            assert_eq!(read_some(&server).await?, b"");
        }
        let mut early = ServerConfig::clone(&server);
        early.max_early_data_size = 1000;
        let (_, refused) = shake_hands(UnixStream::pair()?, (client, Arc::new(early))).await;
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        Ok(())
    });
}

/// Accepts: curio/network/ssl_outgoing
#[test]
fn an_outgoing_connection_with_and_without_a_name_and_with_protocols() {
    run(async {
        let authority = Authority::new();
        let server = authority.server().alpn(&["h2", "http/1.1"]).build()?;
        let server = Server::new().tls(server);
        let listener = server.tcp_socket("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        // Tells the client what it knows of it.
        let _serving = spawn(server.run(listener, async |client| {
            let (name, protocol) = (client.server_name(), client.alpn().unwrap_or_default());
            let protocol = String::from_utf8(protocol).unwrap();
            let about = format!("{} {protocol}", name.as_deref().unwrap_or("nameless"));
            client.write_all(about.as_bytes()).await?;
            client.close().await
        }));
        let told = async |context: ClientContext, name| {
            let mut stream = open_tls_connection(address, context.build()?, name).await?;
            let told = stream.read_to_end(LIMIT).await?;
            io::Result::Ok(String::from_utf8(told).unwrap())
        };
        let trusting = || authority.client();
        assert_eq!(told(trusting(), Some("localhost")).await?, "localhost ");
        // The address is no name that the certificate is for.
        let refused = told(trusting(), None).await.unwrap_err();
        assert!(refused.to_string().contains("127.0.0.1"), "{refused}");
        assert_eq!(told(trusting().any_name(), None).await?, "nameless ");
        let both = trusting().alpn(&["http/1.1", "h2"]);
        assert_eq!(told(both, Some("localhost")).await?, "localhost h2");
        let one = trusting().alpn(&["spdy", "http/1.1"]);
        assert_eq!(told(one, Some("localhost")).await?, "localhost http/1.1");
        let none = told(trusting().alpn(&["spdy"]), Some("localhost"))
            .await
            .unwrap_err();
        assert!(none.to_string().contains("ALPN"), "{none}");
        // Whatever its name, a stranger is a stranger.
        let stranger = Authority::new().client().any_name();
        let refused = told(stranger, None).await.unwrap_err();
        assert!(refused.to_string().contains("UnknownIssuer"), "{refused}");
        Ok(())
    });
}

/// Accepts: curio/network/ssl_manual_wrapping
#[test]
fn a_connection_that_was_used_in_the_clear_is_wrapped_by_hand() {
    run(async {
        let (client, server) = Authority::new().configs();
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let serving = spawn(async move {
            let mut plain = Stream::new(listener.accept().await?.0);
            assert_eq!(plain.read_line(LIMIT).await?, b"STARTTLS\n");
            plain.write_all(b"ready\n").await?;
            let (plain, rest) = plain.into_parts();
            assert_eq!(rest, b"");
            let client = TlsStream::accept(plain, server).await?;
            let mut buf = [0; 100];
            let read = client.read(&mut buf).await?;
            client.write_all(&buf[..read]).await?;
            client.close().await
        });
        let mut plain = Stream::new(TcpStream::connect(address).await?);
        plain.write_all(b"STARTTLS\n").await?;
        assert_eq!(plain.read_line(LIMIT).await?, b"ready\n");
        let stream = TlsStream::connect(plain.into_parts().0, client, "localhost").await?;
        assert_eq!(stream.get_ref().peer_addr()?, address);
        stream.write_all(b"secret").await?;
        assert_eq!(Stream::new(&stream).read_to_end(LIMIT).await?, b"secret");
        serving.join().await.unwrap()
    });
}

/// Accepts: curio/network/errors
#[test]
fn what_cannot_be_used_for_tls_is_named_by_the_error() {
    let authority = Authority::new();
    let [ca, cert, key] = authority.files(&["localhost"]);
    let text = |error: io::Error| error.to_string();
    let path = |path: &PathBuf| path.to_str().unwrap().to_owned();

    let missing = std::env::temp_dir().join(unique("no-such-file"));
    for error in [
        ClientContext::new()
            .trust_file(&missing)
            .map(drop)
            .unwrap_err(),
        read_certificates(&missing).unwrap_err(),
        read_private_key(&missing).unwrap_err(),
    ] {
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(text(error).contains(&path(&missing)));
    }
    let swapped = text(Identity::from_files(&key, &cert).unwrap_err());
    assert!(
        swapped.contains(&path(&key)) && swapped.contains("no certificate"),
        "{swapped}"
    );
    let keyless = text(Identity::from_files(&cert, &ca).unwrap_err());
    assert!(
        keyless.contains(&path(&ca)) && keyless.contains("private key"),
        "{keyless}"
    );
    let damaged = std::fs::read_to_string(&cert)
        .unwrap()
        .replace("-----END", "-----AND");
    std::fs::write(&missing, damaged).unwrap();
    let damaged = read_certificates(&missing).unwrap_err();
    assert_eq!(damaged.kind(), io::ErrorKind::InvalidData);
    let damaged = text(damaged);
    assert!(
        damaged.contains(&path(&missing)) && damaged.contains("damaged"),
        "{damaged}"
    );
    let empty = "-----BEGIN CERTIFICATE-----\nbW9vbg==\n-----END CERTIFICATE-----\n";
    std::fs::write(&missing, empty).unwrap();
    let untrusted = ClientContext::new().trust_file(&missing).map(drop);
    let untrusted = untrusted.unwrap_err();
    assert_eq!(untrusted.kind(), io::ErrorKind::InvalidData);
    let untrusted = text(untrusted);
    assert!(
        untrusted.contains(&path(&missing)) && untrusted.contains("trusted"),
        "{untrusted}"
    );
    std::fs::remove_file(&missing).unwrap();

    let identity = Identity::from_files(&cert, &key).unwrap();
    assert!(!format!("{identity:?}").contains("PRIVATE"));
    ServerContext::new(identity.clone())
        .trust_file(&ca)
        .unwrap()
        .build()
        .unwrap();
    let trusting = || ClientContext::new().trust_file(&ca).unwrap();
    trusting().identity(identity).build().unwrap();

    let [_, _, other_key] = authority.files(&["localhost"]);
    let mixed = Identity::from_files(&cert, &other_key).unwrap();
    for mixed in [
        ServerContext::new(mixed.clone()).build().map(drop),
        trusting().identity(mixed).build().map(drop),
    ] {
        let mixed = text(mixed.unwrap_err());
        assert!(
            mixed.contains(&path(&cert)) && mixed.contains(&path(&other_key)),
            "{mixed}"
        );
    }
    let nobody = text(ClientContext::new().build().unwrap_err());
    assert!(nobody.contains("trust_file"), "{nobody}");
    for wrong in ["", &"x".repeat(256)] {
        let error = trusting().alpn(&["h2", wrong]).build().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(text(error).contains(&wrong.len().to_string()));
    }
    trusting().alpn(&[&"x".repeat(255)]).build().unwrap();
    run(async {
        let refused = TlsStream::connect(UnixStream::pair()?.0, trusting().build()?, "not a name");
        let refused = refused.await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        assert!(refused.to_string().contains("\"not a name\""), "{refused}");
        Ok(())
    });
}

/// Hands out a certificate with a key that is not its own.
#[derive(Debug)]
struct Impostor(Arc<CertifiedKey>);

impl ResolvesServerCert for Impostor {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

#[test]
fn a_client_that_trusts_anybody_still_wants_the_certificates_key() {
    run_virtual(async {
        let stranger = Authority::new();
        let server = ServerContext::new(stranger.identity(&["elsewhere.example"]));
        let server = server.alpn(&["amqp"]).build()?;
        let trusting = || ClientContext::new().dangerously_trust_anybody();
        // What was asked for last does not make it stricter.
        for client in [trusting(), trusting().any_name()] {
            let configs = (client.alpn(&["amqp"]).build()?, server.clone());
            let (client, server) = shake_hands(UnixStream::pair()?, configs).await;
            let (client, server) = (client?, server?);
            assert_eq!(server.server_name().as_deref(), Some("localhost"));
            assert_eq!(client.alpn().as_deref(), Some(&b"amqp"[..]));
            server.write_all(b"whoever I am").await?;
            assert_eq!(read_some(&client).await?, b"whoever I am");
        }

        let (certificate, _) = stranger.issue(&["localhost"]);
        let (_, other_key) = stranger.issue(&["localhost"]);
        let other_key = any_supported_type(&other_key.into()).unwrap();
        let impostor = CertifiedKey::new(vec![certificate.der().clone()], other_key);
        let impostor = Arc::new(Impostor(Arc::new(impostor)));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let impostor = ServerConfig::builder_with_provider(provider.clone())
                .with_protocol_versions(&[version])
                .unwrap()
                .with_no_client_auth()
                .with_cert_resolver(impostor.clone());
            let configs = (trusting().build()?, Arc::new(impostor));
            let (refused, _) = shake_hands(UnixStream::pair()?, configs).await;
            let refused = refused.unwrap_err();
            let bad = rustls::Error::InvalidCertificate(CertificateError::BadSignature);
            assert_eq!(reason(&refused), Some(&bad), "{refused}");
        }
        Ok(())
    });
}

#[test]
fn each_side_learns_why_the_other_was_refused() {
    run_virtual(async {
        let authority = Authority::new();
        let (client, server) = authority.configs();
        let named = ServerContext::new(authority.identity(&["other.example"])).build()?;
        let configs = (client.clone(), named);
        let (client_side, server_side) = shake_hands(UnixStream::pair()?, configs).await;
        let wrong_name = client_side.unwrap_err();
        assert!(matches!(
            reason(&wrong_name),
            Some(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForNameContext { .. }
            ))
        ));
        let text = wrong_name.to_string();
        for word in [
            "TLS with localhost",
            "\"localhost\"",
            "other.example",
            "by a name",
        ] {
            assert!(text.contains(word), "{text}");
        }
        let told = server_side.unwrap_err();
        let alert = rustls::Error::AlertReceived(AlertDescription::BadCertificate);
        assert_eq!(reason(&told), Some(&alert));

        let stranger = Authority::new().server().build()?;
        let configs = (client.clone(), stranger);
        let (client_side, server_side) = shake_hands(UnixStream::pair()?, configs).await;
        let unknown = client_side.unwrap_err().to_string();
        assert!(
            unknown.contains("trust the certificate authority"),
            "{unknown}"
        );
        let told = server_side.unwrap_err().to_string();
        assert!(told.contains("does not know who signed"), "{told}");

        let (mut client_config, old) = (ClientConfig::clone(&client), server);
        client_config.alpn_protocols = vec![b"amqp".to_vec()];
        let mut server_config = ServerConfig::clone(&old);
        server_config.alpn_protocols = vec![b"h2".to_vec()];
        let configs = (Arc::new(client_config), Arc::new(server_config));
        let (client_side, server_side) = shake_hands(UnixStream::pair()?, configs).await;
        let told = client_side.unwrap_err().to_string();
        assert!(told.contains("application protocols"), "{told}");
        let no_protocol = server_side.unwrap_err();
        assert_eq!(
            reason(&no_protocol),
            Some(&rustls::Error::NoApplicationProtocol)
        );
        Ok(())
    });
}

#[test]
fn a_server_that_wants_certificates_admits_those_it_can_check() {
    run_virtual(async {
        let authority = Authority::new();
        let strict = authority.server().trust(authority.0.der().clone())?;
        let lenient = strict.clone().admit_unknown().build()?;
        let strict = strict.build()?;
        let nameless = authority.client().build()?;
        let (certificate, key) = authority.issue(&["client.example"]);
        let identity = Identity::new(vec![certificate.der().clone()], key.into());
        let named = authority.client().identity(identity).build()?;
        let stranger = Authority::new().identity(&["client.example"]);
        let stranger = authority.client().identity(stranger).build()?;

        for (client, server, expected) in [
            (&named, &strict, Some(certificate.der())),
            (&named, &lenient, Some(certificate.der())),
            (&nameless, &lenient, None),
        ] {
            let configs = (client.clone(), server.clone());
            let (client, server) = shake_hands(UnixStream::pair()?, configs).await;
            let shown = server?.peer_certificates();
            assert_eq!(shown.as_ref().and_then(|chain| chain.first()), expected);
            assert!(client?.peer_certificates().is_some());
        }
        for (client, server, told) in [
            (&nameless, &strict, "needs a certificate"),
            (&stranger, &strict, "UnknownCA"),
            (&stranger, &lenient, "UnknownCA"),
        ] {
            let configs = (client.clone(), server.clone());
            let (client, server) = shake_hands(UnixStream::pair()?, configs).await;
            server.unwrap_err();
            // In TLS 1.3 the client is through when it has shown its certificate. What became of that it reads.
            let refused = read_some(&client?).await.unwrap_err().to_string();
            assert!(refused.contains(told), "{refused}");
        }
        Ok(())
    });
}

#[test]
fn a_megabyte_goes_both_ways_at_once() {
    run(async {
        let (client, server) = Authority::new().configs();
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let accepting = spawn(async move {
            let (stream, _) = listener.accept().await?;
            TlsStream::accept(stream, server).await
        });
        let stream = TcpStream::connect(address).await?;
        let client = TlsStream::connect(stream, client, "localhost").await?;
        let server = accepting.join().await.unwrap()?;
        let sent = Rc::new(numbers(1 << 20));
        let mut sides = Vec::new();
        for stream in [client, server] {
            let stream = Rc::new(stream);
            sides.push(spawn({
                let (stream, sent) = (stream.clone(), sent.clone());
                async move {
                    stream.write_all(&sent).await?;
                    stream.shutdown().await
                }
            }));
            sides.push(spawn({
                let sent = sent.clone();
                async move {
                    let mut stream = Stream::new(stream);
                    let mut received = vec![0; sent.len()];
                    stream.read_exact(&mut received).await?;
                    assert!(received == *sent);
                    assert_eq!(stream.read_to_end(LIMIT).await?, b"");
                    Ok(())
                }
            }));
        }
        for side in sides {
            side.join().await.unwrap()?;
        }
        Ok(())
    });
}

#[test]
fn half_a_connection_ends_and_the_other_half_goes_on() {
    run_virtual(async {
        let (client, server) = tls_pair().await?;
        client.write_all(b"last words").await?;
        client.shutdown().await?;
        client.shutdown().await?;
        let refused = client.write(b"more").await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(read_some(&server).await?, b"last words");
        for _ in 0..2 {
            assert_eq!(read_some(&server).await?, b"");
        }
        let answer = numbers(1 << 20);
        let answering = spawn({
            let answer = answer.clone();
            async move {
                server.write_all(&answer).await?;
                server.close().await
            }
        });
        let received = Stream::new(&client).read_to_end(LIMIT).await?;
        assert!(received == answer);
        answering.join().await.unwrap()
    });
}

#[test]
fn an_end_without_a_word_is_an_error() {
    run_virtual(async {
        for sent in [&b""[..], b"half of the st"] {
            let (client, server) = tls_pair().await?;
            server.write_all(sent).await?;
            drop(server);
            let mut stream = Stream::new(client);
            let cut = stream.read_to_end(LIMIT).await.unwrap_err();
            assert_eq!(cut.error.kind(), io::ErrorKind::UnexpectedEof);
            assert!(cut.to_string().contains("close_notify"), "{cut}");
            assert_eq!(stream.buffered(), sent);
            let again = stream.get_ref().read(&mut [0; 10]).await.unwrap_err();
            assert_eq!(again.kind(), io::ErrorKind::UnexpectedEof);
        }
        Ok(())
    });
}

#[test]
fn a_truncated_record_is_an_error_and_what_came_before_is_not_lost() {
    run_virtual(async {
        let (client, server, tap) = tapped_pair().await?;
        tap.hold();
        server.write_all(b"first").await?;
        let first = tap.held().await?;
        server.write_all(b"second").await?;
        let second = tap.held().await?;
        tap.to_client.write_all(&first).await?;
        tap.to_client.write_all(&second[..second.len() - 1]).await?;
        tap.to_client.shutdown(Shutdown::Write)?;
        assert_eq!(read_some(&client).await?, b"first");
        let cut = read_some(&client).await.unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
        Ok(())
    });
}

#[test]
fn a_corrupt_byte_anywhere_in_a_record_is_an_error_for_both_sides() {
    run_virtual(async {
        let length = {
            let (_client, server, tap) = tapped_pair().await?;
            tap.hold();
            server.write_all(b"secret").await?;
            tap.held().await?.len()
        };
        // The version in a record's header means nothing (RFC 8446, 5.1).
        for at in (0..length).filter(|at| !(1..3).contains(at)) {
            let (client, server, tap) = tapped_pair().await?;
            tap.hold();
            server.write_all(b"before").await?;
            let before = tap.held().await?;
            server.write_all(b"secret").await?;
            let mut record = tap.held().await?;
            assert_eq!(record.len(), length);
            record[at] ^= 0x40;
            tap.to_client.write_all(&[before, record].concat()).await?;
            // The record may be told to be longer; then it is one with the next.
            tap.to_client.write_all(&vec![0; 1 << 15]).await?;
            assert_eq!(read_some(&client).await?, b"before", "byte {at}");
            for _ in 0..2 {
                let forged = read_some(&client).await.unwrap_err();
                assert_eq!(forged.kind(), io::ErrorKind::InvalidData, "byte {at}");
                assert!(reason(&forged).is_some(), "byte {at}: {forged}");
            }
            let refused = client.write(b"more").await.unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
            let told = read_some(&server).await.unwrap_err();
            let alert = reason(&told);
            assert!(
                matches!(alert, Some(rustls::Error::AlertReceived(_))),
                "byte {at}: {told}"
            );
        }
        Ok(())
    });
}

#[test]
fn an_interrupted_read_goes_on_in_the_middle_of_a_record() {
    run_virtual(async {
        let (client, server, tap) = tapped_pair().await?;
        tap.hold();
        server.write_all(b"one record").await?;
        let record = tap.held().await?;
        let mut polls = 0;
        for byte in &record[..record.len() - 1] {
            tap.to_client.write_all(&[*byte]).await?;
            polls += 1;
            if polls % 2 == 0 {
                let late = timeout_after(SECOND, read_some(&client)).await;
                assert!(is_timeout(&late), "{late:?}");
            } else {
                assert!(drop_after(SECOND, read_some(&client)).await.is_none());
            }
        }
        tap.to_client.write_all(&record[record.len() - 1..]).await?;
        assert_eq!(read_some(&client).await?, b"one record");
        Ok(())
    });
}

#[test]
fn a_handshake_that_is_given_up_closes_the_connection_wherever_it_was() {
    run_virtual(async {
        let (config, server_config) = Authority::new().configs();
        for step in 0..8 {
            let ((client, server), tap) = tapped()?;
            tap.hold();
            let accepting = spawn(TlsStream::accept(server, server_config.clone()));
            let connecting = TlsStream::connect(client, config.clone(), "localhost");
            let connecting = spawn(async move {
                if step % 2 == 0 {
                    let late = timeout_after(10 * SECOND, connecting).await;
                    assert!(is_timeout(&late));
                } else {
                    assert!(drop_after(10 * SECOND, connecting).await.is_none());
                }
            });
            let flight = tap.held().await?;
            assert!(flight.len() > 500, "{}", flight.len());
            // Of this very flight: the next one's signature may be a byte or two shorter.
            let part = flight.len() * step / 8;
            tap.to_client.write_all(&flight[..part]).await?;
            connecting.join().await.unwrap();
            // The server was waiting for the client's answer.
            let hung_up = accepting.join().await.unwrap().unwrap_err();
            assert_eq!(hung_up.kind(), io::ErrorKind::UnexpectedEof);
            assert!(hung_up.to_string().contains("hung up"), "{hung_up}");
        }
        Ok(())
    });
}

#[test]
fn a_server_that_is_cancelled_in_a_handshake_hangs_up() {
    run_virtual(async {
        let (_, config) = Authority::new().configs();
        let (silent, server) = UnixStream::pair()?;
        let accepting = spawn(TlsStream::accept(server, config));
        sleep(SECOND).await?;
        accepting.cancel().await?;
        let cancelled = accepting.join().await.unwrap().unwrap_err();
        assert_eq!(cancelled.interrupt(), Some(&Interrupt::cancelled()));
        assert_eq!(silent.read(&mut [0; 10]).await?, 0);
        Ok(())
    });
}

#[test]
fn a_client_that_never_speaks_or_speaks_no_tls_is_let_go() {
    let logged = lines_of(log::Level::Warn, || {
        run_virtual(async {
            let (config, server) = Authority::new().configs();
            let server = Server::new().max_clients(2).tls(server);
            let server = server.handshake_timeout(5 * SECOND);
            let listener = server.tcp_socket("127.0.0.1:0")?;
            let address = listener.local_addr()?;
            let serving = spawn(server.run(listener, async |client| {
                client.write_all(b"welcome\n").await?;
                client.close().await
            }));
            let silent = TcpStream::connect(address).await?;
            let confused = TcpStream::connect(address).await?;
            confused.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
            let start = kernel::now();
            let mut buf = [0; 100];
            // Content type 21, an alert.
            assert_eq!(confused.read(&mut buf).await?, 7);
            assert_eq!(buf[0], 21);
            assert_eq!(confused.read(&mut buf).await?, 0);
            assert_eq!(kernel::now(), start);
            // Both places are taken for five seconds at most.
            let _silent_too = TcpStream::connect(address).await?;
            let served = open_tls_connection(address, config, Some("localhost")).await;
            assert_eq!(kernel::now() - start, 5 * SECOND);
            assert_eq!(served?.read_line(LIMIT).await?, b"welcome\n");
            assert_eq!(silent.read(&mut buf).await?, 0);
            // A client that waits is not asked all the time.
            let cycles = serving.cycles();
            assert!(cycles < 20, "{cycles}");
            Ok(())
        });
    });
    for said in ["does it speak TLS", "no TLS handshake within 5s"] {
        assert!(logged.iter().any(|line| line.contains(said)), "{logged:#?}");
    }
}

/// Writes until the socket takes no more, so that something is left inside the stream. Says how much was written.
async fn fill(stream: &Unix) -> usize {
    let block = numbers(10_000);
    let mut sent = 0;
    loop {
        match timeout_after(SECOND, stream.write(&block)).await {
            Ok(written) => sent += written,
            late => {
                assert!(is_timeout(&late), "{late:?}");
                return sent;
            }
        }
    }
}

/// Reads that many bytes, and none that come after them.
async fn read_exact(stream: &impl kernel::net::Read, length: usize) -> io::Result<Vec<u8>> {
    let mut received = vec![0; length];
    let mut done = 0;
    while done < length {
        match stream.read(&mut received[done..]).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => done += read,
        }
    }
    Ok(received)
}

#[test]
fn an_interrupted_write_goes_on_where_it_was() {
    run_virtual(async {
        let (client, server) = tls_pair().await?;
        let sent = numbers(2 << 20);
        let (mut done, mut interrupts) = (0, 0);
        let mut received = Vec::new();
        while done < sent.len() {
            match timeout_after(SECOND, client.write_all(&sent[done..])).await {
                Ok(()) => done = sent.len(),
                Err(late) => {
                    assert!(late.interrupt().is_some(), "{late}");
                    done += late.done;
                    interrupts += 1;
                }
            }
            // As much as there is without the writer.
            while let Ok(more) = timeout_after(SECOND, read_some(&server)).await {
                received.extend(more);
            }
        }
        assert!(interrupts > 1, "{interrupts}");
        client.close().await?;
        received.extend(Stream::new(server).read_to_end(LIMIT).await?);
        assert!(received == sent);
        Ok(())
    });
}

#[test]
fn a_reader_sends_what_a_writer_left_behind() {
    run_virtual(async {
        let (client, server) = tls_pair().await?;
        let sent = fill(&client).await;
        let answering = spawn(async move {
            let question = read_exact(&server, sent).await?;
            assert_eq!(question.len(), sent);
            server.write_all(b"answer").await?;
            server.close().await
        });
        let answer = timeout_after(SECOND, read_some(&client)).await?;
        assert_eq!(answer, b"answer");
        answering.join().await.unwrap()
    });
}

#[test]
fn a_pending_cancellation_reaches_a_reader_that_has_to_write_first() {
    run_virtual(async {
        let (client, _server) = tls_pair().await?;
        fill(&client).await;
        let reader = spawn(async move { read_some(&client).await });
        assert!(reader.request_cancel("before its first step"));
        let read = timeout_after(SECOND, async { Ok::<_, Interrupt>(reader.join().await) }).await;
        let error = read.expect("it is told").unwrap().unwrap_err();
        assert!(matches!(error.interrupt(), Some(Interrupt::Cancelled(_))));
        Ok(())
    });
}

#[test]
fn a_writer_waits_for_a_reader_that_writes_and_goes_on_when_that_is_gone() {
    for is_given_up in [false, true] {
        run_virtual(async {
            let (client, server) = tls_pair().await?;
            let client = Rc::new(client);
            let sent = fill(&client).await;
            let reader = spawn({
                let client = client.clone();
                async move { read_some(&client).await }
            });
            sleep(SECOND).await?;
            let writer = spawn({
                let client = client.clone();
                async move { client.write_all(b"and the rest").await }
            });
            sleep(SECOND).await?;
            assert!(!writer.is_terminated());
            if is_given_up {
                reader.cancel().await?;
                sleep(SECOND).await?;
                assert!(!writer.is_terminated());
            }
            let received = read_exact(&server, sent + 12).await?;
            assert_eq!(&received[sent..], b"and the rest");
            writer.join().await.unwrap()?;
            if !is_given_up {
                server.write_all(b"answer").await?;
                assert_eq!(reader.join().await.unwrap()?, b"answer");
            }
            Ok(())
        });
    }
}

#[test]
fn a_second_reader_and_a_second_writer_are_refused() {
    run_virtual(async {
        let (client, _server) = tls_pair().await?;
        let client = Rc::new(client);
        let reader = spawn({
            let client = client.clone();
            async move { read_some(&client).await }
        });
        sleep(SECOND).await?;
        let refused = read_some(&client).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ResourceBusy);
        reader.cancel().await?;
        let writer = spawn({
            let client = client.clone();
            async move { client.write_all(&numbers(1 << 20)).await }
        });
        sleep(SECOND).await?;
        let refused = client.write(b"x").await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ResourceBusy);
        assert!(!writer.is_terminated());
        Ok(())
    });
}

#[test]
fn what_nobody_reads_stays_with_its_sender() {
    run_virtual(async {
        let (client, server) = tls_pair().await?;
        let sender = spawn(async move {
            let flood = numbers(16 << 20);
            let late = timeout_after(3600 * SECOND, server.write_all(&flood)).await;
            late.unwrap_err().done
        });
        let mut byte = [0];
        for expected in 0..1000_usize {
            assert_eq!(client.read(&mut byte).await?, 1);
            assert_eq!(usize::from(byte[0]), expected % 251);
        }
        // The sockets' buffers and our own, and not all of it.
        let taken = sender.join().await.unwrap();
        assert!(taken < 2 << 20, "{taken}");
        Ok(())
    });
}

#[test]
fn a_connection_that_is_idle_is_not_polled() {
    run_virtual(async {
        let (client, _server) = tls_pair().await?;
        let reader = spawn(async move { read_some(&client).await });
        sleep(SECOND).await?;
        let cycles = reader.cycles();
        sleep(3600 * SECOND).await?;
        assert_eq!(reader.cycles(), cycles);
        let info = reader.info().unwrap().to_string();
        assert!(info.contains("kernel_tls.rs"), "{info}");
        Ok(())
    });
}

#[test]
fn one_task_reads_lines_while_another_writes() {
    run(async {
        let (client, server) = tls_pair().await?;
        let text: String = (0..5000).map(|i| format!("line {i}\n")).collect();
        let echoing = spawn(async move {
            let server = Rc::new(server);
            let mut input = Stream::new(server.clone());
            loop {
                let line = input.read_line(LIMIT).await?;
                if line.is_empty() {
                    return server.shutdown().await;
                }
                server.write_all(&line).await?;
            }
        });
        let client = Rc::new(client);
        let writing = spawn({
            let (client, text) = (client.clone(), text.clone());
            async move {
                let output = Stream::new(client.clone());
                output.write_all(text.as_bytes()).await?;
                client.shutdown().await
            }
        });
        let mut input = Stream::new(client);
        let mut echoed = Vec::new();
        loop {
            match input.read_line(LIMIT).await? {
                line if line.is_empty() => break,
                line => echoed.extend(line),
            }
        }
        assert!(echoed == text.as_bytes());
        writing.join().await.unwrap()?;
        echoing.join().await.unwrap()
    });
}

#[test]
fn several_buffers_leave_in_their_order() {
    run_virtual(async {
        let (client, server) = tls_pair().await?;
        let bufs = [&b"one "[..], b"", b"two"].map(io::IoSlice::new);
        assert_eq!(client.write_vectored(&bufs).await?, 7);
        assert_eq!(read_some(&server).await?, b"one two");
        assert_eq!(client.write(b"").await?, 0);
        Ok(())
    });
}

// ---- code that polls

#[test]
fn the_tools_of_futures_copy_split_and_close_a_tls_stream() {
    run_virtual(async {
        let (client, server) = tls_pair().await?;
        let echo = spawn(async move {
            let (reader, mut writer) = Polled::new(server).split();
            let copied = copy(reader, &mut writer).await?;
            writer.close().await?;
            io::Result::Ok(copied)
        });
        let sent = numbers(3 << 20);
        let mut back = Vec::new();
        let (mut reader, mut writer) = Polled::new(client).split();
        let sending = async {
            writer.write_all(&sent).await?;
            writer.close().await
        };
        // It would be an error if the end were not said.
        let (sending, receiving) = join(sending, reader.read_to_end(&mut back)).await;
        sending?;
        receiving?;
        assert!(back == sent);
        assert_eq!(echo.join().await.unwrap()?, sent.len() as u64);
        Ok(())
    });
}

#[test]
fn code_that_polls_a_tls_stream_is_told_of_interrupts_and_cuts() {
    run_virtual(async {
        let (client, mut server) = tls_pair().await?;
        let mut stream = Stream::new(client);
        server.write_all(b"line\nrest").await?;
        assert_eq!(stream.read_line(LIMIT).await?, b"line\n");
        // What a buffer had comes first; then it waits, and may be asked again after a timeout.
        let mut client = Polled::from(stream);
        let mut buf = [0; 10];
        assert_eq!(client.read(&mut buf).await?, 4);
        let late = timeout_after(SECOND, client.read(&mut buf)).await;
        assert!(is_timeout(&late), "{late:?}");
        server.write_all(b"more").await?;
        assert_eq!(client.read(&mut buf).await?, 4);

        // A reader sends what the system did not take, and so does a flush.
        let (mut client, rest) = client.into_parts();
        assert!(rest.is_empty());
        for flushes in [false, true] {
            let sent = fill(&client).await;
            let answering = spawn(async move {
                let question = read_exact(&server, sent).await?;
                assert_eq!(question.len(), sent);
                server.write_all(b"answer").await?;
                io::Result::Ok(server)
            });
            let mut polled = Polled::new(client);
            if flushes {
                timeout_after(SECOND, polled.flush()).await?;
            }
            let answer = timeout_after(SECOND, polled.read(&mut buf)).await?;
            assert_eq!(&buf[..answer], b"answer");
            (client, _) = polled.into_parts();
            server = answering.join().await.unwrap()?;
        }

        let mut client = Polled::new(client);
        drop(server);
        let cut = client.read(&mut buf).await.unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);

        // With something to send as well, the one that is told of a cancellation passes it on.
        let (client, _server) = tls_pair().await?;
        fill(&client).await;
        let reader = spawn(async move { Polled::new(client).read(&mut [0; 10]).await });
        assert!(reader.request_cancel("before its first step"));
        let read = timeout_after(SECOND, async { Ok::<_, Interrupt>(reader.join().await) }).await;
        let error = read.expect("it is told").unwrap().unwrap_err();
        assert!(matches!(error.interrupt(), Some(Interrupt::Cancelled(_))));
        Ok(())
    });
}

type Body = Full<Bytes>;

/// Sends back what it gets, with the version of HTTP in a header.
async fn echo(request: Request<Incoming>) -> hyper::Result<Response<Body>> {
    let version = format!("{:?}", request.version());
    let body = request.into_body().collect().await?.to_bytes();
    let reply = Response::builder().header("version", version);
    Ok(reply.body(body.into()).unwrap())
}

async fn serve_https(client: TlsStream<TcpStream>) -> io::Result<()> {
    let is_http2 = client.alpn().is_some_and(|protocol| protocol == b"h2");
    let (client, service) = (Polled::new(client), service_fn(echo));
    let served = if is_http2 {
        let mut http = server::conn::http2::Builder::new(KernelExecutor);
        http.timer(KernelTimer)
            .serve_connection(client, service)
            .await
    } else {
        let mut http = server::conn::http1::Builder::new();
        http.timer(KernelTimer)
            .serve_connection(client, service)
            .await
    };
    served.map_err(io::Error::other)
}

enum Sender {
    Http1(client::conn::http1::SendRequest<Body>),
    Http2(client::conn::http2::SendRequest<Body>),
}

impl Sender {
    async fn over(stream: TlsStream<TcpStream>) -> hyper::Result<Self> {
        let is_http2 = stream.alpn().is_some_and(|protocol| protocol == b"h2");
        let stream = Polled::new(stream);
        if is_http2 {
            let mut http = client::conn::http2::Builder::new(KernelExecutor);
            let (sender, connection) = http.timer(KernelTimer).handshake(stream).await?;
            spawn(connection);
            Ok(Self::Http2(sender))
        } else {
            let (sender, connection) = client::conn::http1::handshake(stream).await?;
            spawn(connection);
            Ok(Self::Http1(sender))
        }
    }

    /// Says the version that the server saw, and what it sent back.
    async fn ask(&mut self, body: Bytes) -> hyper::Result<(String, Bytes)> {
        let request = Request::post("https://localhost/echo").header("host", "localhost");
        let request = request.body(Body::from(body)).unwrap();
        let reply = match self {
            Self::Http1(sender) => sender.send_request(request).await?,
            Self::Http2(sender) => sender.send_request(request).await?,
        };
        let version = reply.headers()["version"].to_str().unwrap().to_owned();
        Ok((version, reply.into_body().collect().await?.to_bytes()))
    }
}

/// Accepts: interop/hyper
#[test]
fn hyper_serves_and_asks_over_tls_in_the_version_of_http_that_both_know() {
    run(async {
        let authority = Authority::new();
        let server = authority.server().alpn(&["h2", "http/1.1"]).build()?;
        let server = Server::new().tls(server);
        let listener = server.tcp_socket("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let serving = spawn(server.run(listener, serve_https));
        let much = Bytes::from(numbers(1 << 20));
        for (known, version) in [
            (&["h2", "http/1.1"][..], "HTTP/2.0"),
            (&["http/1.1"], "HTTP/1.1"),
            (&[], "HTTP/1.1"),
        ] {
            let config = authority.client().alpn(known).build()?;
            let stream = TcpStream::connect(address).await?;
            let stream = TlsStream::connect(stream, config, "localhost").await?;
            let mut sender = Sender::over(stream).await.map_err(io::Error::other)?;
            for body in [Bytes::from("small"), much.clone(), "small again".into()] {
                let answer = sender.ask(body.clone()).await.map_err(io::Error::other)?;
                assert!(answer == (version.to_owned(), body), "{version}");
            }
        }
        serving.cancel().await?;
        Ok(())
    });
}

/// A Python that has no package but its own.
fn python(script: &str, arguments: &[&str]) -> Process {
    Process::spawn(
        Command::new("python3")
            .args(["-u", "-c", script])
            .args(arguments),
    )
}

/// Reads to our `close_notify`, for nothing else ends it, and says it backwards.
const PYTHON_SERVER: &str = r#"
import socket, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[2], sys.argv[3])
context.load_verify_locations(sys.argv[1])
context.verify_mode = ssl.CERT_REQUIRED
context.maximum_version = ssl.TLSVersion[sys.argv[4]]
context.set_alpn_protocols(["amqp"])
listener = socket.create_server(("127.0.0.1", 0))
print("port", listener.getsockname()[1])
client = context.wrap_socket(listener.accept()[0], server_side=True, suppress_ragged_eofs=False)
received = bytearray()
while len(received) < int(sys.argv[5]):
    received += client.recv(1 << 16)
client.sendall(received[::-1])
assert client.recv(1) == b""
print("done", client.version(), client.selected_alpn_protocol())
client.unwrap()
"#;

#[test]
fn pythons_server_understands_us() {
    let authority = Authority::new();
    let [ca, cert, key] = authority
        .files(&["localhost"])
        .map(|path| path.display().to_string());
    let sent = numbers(300_000);
    for (version, said) in [("TLSv1_2", "TLSv1.2"), ("TLSv1_3", "TLSv1.3")] {
        let length = sent.len().to_string();
        let server = python(PYTHON_SERVER, &[&ca, &cert, &key, version, &length]);
        let line = server.wait_for_line("port");
        let port = line.split_whitespace().last().unwrap().to_owned();
        run(async {
            let identity = authority.identity(&["client.example"]);
            let context = authority.client().identity(identity).alpn(&["amqp"]);
            let address = format!("127.0.0.1:{port}");
            let stream = open_tls_connection(address, context.build()?, Some("localhost"));
            let mut stream = stream.await?;
            stream.write_all(&sent).await?;
            let mut received = vec![0; sent.len()];
            stream.read_exact(&mut received).await?;
            received.reverse();
            assert!(received == sent);
            stream.get_ref().shutdown().await?;
            assert_eq!(stream.read_to_end(LIMIT).await?, b"");
            Ok(())
        });
        let ended = server.ended().expect_code(0);
        assert!(
            ended.stdout.contains(&format!("done {said} amqp")),
            "{}",
            ended.stdout
        );
    }
}

const PYTHON_CLIENT: &str = r#"
import socket, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[1])
context.maximum_version = ssl.TLSVersion[sys.argv[3]]
def connect(name):
    plain = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
    return context.wrap_socket(plain, server_hostname=name, suppress_ragged_eofs=False)
try:
    connect("elsewhere")
except ssl.SSLCertVerificationError as error:
    print("refused", error.verify_message)
server = connect("localhost")
sent = bytes(range(256)) * 1000
server.sendall(sent)
received = bytearray()
while len(received) < len(sent):
    received += server.recv(1 << 16)
assert received == sent[::-1]
print("done", server.version())
server.unwrap()
"#;

#[test]
fn pythons_client_understands_us() {
    let authority = Authority::new();
    let [ca, ..] = authority
        .files(&["localhost"])
        .map(|path| path.display().to_string());
    for (version, said) in [("TLSv1_2", "TLSv1.2"), ("TLSv1_3", "TLSv1.3")] {
        run(async {
            let server = Server::new().tls(authority.server().build()?);
            let listener = server.tcp_socket("127.0.0.1:0")?;
            let port = listener.local_addr()?.port().to_string();
            let _serving = spawn(server.run(listener, async |client| {
                let mut received = read_exact(&client, 256_000).await?;
                received.reverse();
                client.write_all(&received).await?;
                assert_eq!(client.read(&mut [0; 1]).await?, 0);
                client.close().await
            }));
            let client = python(PYTHON_CLIENT, &[&ca, &port, version]);
            let ended = kernel::run_in_thread(move || client.ended())
                .await?
                .expect_code(0);
            assert!(
                ended.stdout.contains("refused Hostname mismatch"),
                "{}",
                ended.stdout
            );
            assert!(
                ended.stdout.contains(&format!("done {said}")),
                "{}",
                ended.stdout
            );
            Ok(())
        });
    }
}

// ---- ends

#[test]
fn a_close_says_when_the_other_side_could_not_be_told() {
    run_virtual(async {
        let (client, server) = tls_pair().await?;
        drop(server);
        let untold = client.close().await.unwrap_err();
        assert_eq!(untold.kind(), io::ErrorKind::BrokenPipe);
        Ok(())
    });
}

/// What is unread is read away before, until there is no more of it.
#[test]
fn both_sides_can_close_with_nothing_read() {
    run_virtual(async {
        let (client, server) = tls_pair().await?;
        server.write_all(b"moon").await?;
        server.shutdown().await?;
        client.close().await?;
        server.close().await
    });
}

/// Takes nothing of what is written to it.
struct Deaf(unix::UnixStream);

impl AsFd for Deaf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl io::Read for &Deaf {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(buf)
    }
}

impl io::Write for &Deaf {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Ok(0)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_handshake_that_cannot_be_written_is_an_error() {
    run_virtual(async {
        let (ours, _theirs) = unix::UnixStream::pair()?;
        let (config, _) = Authority::new().configs();
        let deaf = TlsStream::connect(Io::from_std(Deaf(ours))?, config, "localhost");
        let outcome = timeout_after(SECOND, deaf).await;
        assert_eq!(
            outcome.map(drop).unwrap_err().kind(),
            io::ErrorKind::WriteZero
        );
        Ok(())
    });
}

#[test]
fn a_task_that_reads_what_is_there_in_small_pieces_lets_others_run() {
    run_virtual(async {
        let (client, server) = tls_pair().await?;
        server.write_all(&[7; 1000]).await?;
        let turns = Rc::new(Cell::new(0));
        let others = Rc::clone(&turns);
        let other = spawn(async move {
            while yield_now().await.is_ok() {
                others.set(others.get() + 1);
            }
        });
        assert_eq!(client.read(&mut [0]).await?, 1); // and with it all
        turns.set(0);
        for _ in 1..1000 {
            assert_eq!(client.read(&mut [0]).await?, 1);
        }
        let turns = turns.get();
        assert!((1..100).contains(&turns), "{turns}");
        other.cancel().await?;
        Ok(())
    });
}
