//! What each side of TLS trusts and shows: Python's `SSLContext`, as rustls' configurations.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WantsClientCert, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct, RootCertStore,
    ServerConfig, SignatureScheme, WantsVerifier,
};

/// Makes the [`ClientConfig`] that [`TlsStream::connect`](super::tls::TlsStream::connect) takes: TLS 1.3 and 1.2, with the cryptography of ring.
///
/// Trusts nobody at first. There is no list of authorities inside: most systems have one, on Debian in
/// `/etc/ssl/certs/ca-certificates.crt`.
///
/// ```no_run
/// use kernel::net::tls::{ClientContext, Identity};
///
/// let context = ClientContext::new()
///     .trust_file("our-ca.pem")?
///     .identity(Identity::from_files("client.pem", "client-key.pem")?)
///     .alpn(&["h2", "http/1.1"])
///     .build()?;
/// # std::io::Result::Ok(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "`build` makes a configuration of it"]
pub struct ClientContext {
    roots: RootCertStore,
    identity: Option<Identity>,
    alpn: Vec<Vec<u8>>,
    checks: Checks,
}

/// What a client wants to know of a server's certificate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Checks {
    All,
    AllButName,
    Nothing,
}

impl ClientContext {
    /// Trusts nobody, shows no certificate, checks names, offers no application protocol.
    pub fn new() -> Self {
        Self {
            roots: RootCertStore::empty(),
            identity: None,
            alpn: Vec::new(),
            checks: Checks::All,
        }
    }

    /// Trusts servers whose certificates this authority, one of one's own perhaps, has signed.
    ///
    /// # Errors
    /// `InvalidData` if it is no certificate.
    pub fn trust(mut self, authority: CertificateDer<'static>) -> io::Result<Self> {
        trust(&mut self.roots, authority, "a certificate")?;
        Ok(self)
    }

    /// Trusts every authority in a PEM file. Reads it on the spot.
    ///
    /// # Errors
    /// As [`read_certificates`].
    pub fn trust_file(mut self, path: impl AsRef<Path>) -> io::Result<Self> {
        trust_file(&mut self.roots, path.as_ref())?;
        Ok(self)
    }

    /// Shows a certificate to servers that ask for one.
    pub fn identity(mut self, identity: Identity) -> Self {
        self.identity = Some(identity);
        self
    }

    /// Offers application protocols, the best first (ALPN).
    pub fn alpn(mut self, protocols: &[&str]) -> Self {
        self.alpn = protocols
            .iter()
            .map(|name| name.as_bytes().to_vec())
            .collect();
        self
    }

    /// Accepts a certificate for any name, as long as a trusted authority has signed it, and tells the server no name
    /// (Python's `check_hostname = False`). Whoever has any certificate of those authorities can then pass for the server: for
    /// an authority of one's own that signs servers alone.
    pub const fn any_name(mut self) -> Self {
        if matches!(self.checks, Checks::All) {
            self.checks = Checks::AllButName;
        }
        self
    }

    /// Accepts any certificate, whoever signed it and for whatever name, and needs to trust nobody (Python's `CERT_NONE`). What is said is hidden from those who
    /// only listen. But whoever sits between the two can pass for the server, read everything and change it: to reach a server with a certificate of its
    /// own making, [`trust_file`](Self::trust_file) that certificate instead.
    pub const fn dangerously_trust_anybody(mut self) -> Self {
        self.checks = Checks::Nothing;
        self
    }

    /// The configuration; make it once and share it.
    ///
    /// # Errors
    /// `InvalidInput` if nobody is trusted (but for [`dangerously_trust_anybody`](Self::dangerously_trust_anybody)), if the identity's certificate and key do not belong together, or if a protocol's name is empty or longer
    /// than 255 bytes.
    pub fn build(self) -> io::Result<Arc<ClientConfig>> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| invalid(error.to_string()))?;
        let builder = match self.checks {
            Checks::All => builder.with_webpki_verifier(authorities(self.roots)?),
            Checks::AllButName => Lenient::over(Some(authorities(self.roots)?), builder),
            Checks::Nothing => Lenient::over(None, builder),
        };
        let mut config = match self.identity {
            None => builder.with_no_client_auth(),
            Some(Identity { chain, key, origin }) => builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| unusable(&origin, &error))?,
        };
        config.enable_sni = self.checks != Checks::AllButName;
        config.alpn_protocols = checked(self.alpn)?;
        Ok(Arc::new(config))
    }
}

impl Default for ClientContext {
    fn default() -> Self {
        Self::new()
    }
}

/// Makes the [`ServerConfig`] that [`TlsStream::accept`](super::tls::TlsStream::accept) takes: TLS 1.3 and 1.2, with the cryptography of ring.
///
/// ```no_run
/// use kernel::net::tls::{Identity, ServerContext};
///
/// let identity = Identity::from_files("server.pem", "server-key.pem")?;
/// let context = ServerContext::new(identity).trust_file("our-ca.pem")?.build()?;
/// # std::io::Result::Ok(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "`build` makes a configuration of it"]
pub struct ServerContext {
    identity: Identity,
    roots: RootCertStore,
    admits_unknown: bool,
    alpn: Vec<Vec<u8>>,
}

impl ServerContext {
    /// Shows this certificate, and asks clients for none.
    pub fn new(identity: Identity) -> Self {
        Self {
            identity,
            roots: RootCertStore::empty(),
            admits_unknown: false,
            alpn: Vec::new(),
        }
    }

    /// Admits only clients that show a certificate which this authority, or another that was named so, has signed.
    ///
    /// # Errors
    /// `InvalidData` if it is no certificate.
    pub fn trust(mut self, authority: CertificateDer<'static>) -> io::Result<Self> {
        trust(&mut self.roots, authority, "a certificate")?;
        Ok(self)
    }

    /// As [`trust`](Self::trust), for every authority in a PEM file. Reads it on the spot.
    ///
    /// # Errors
    /// As [`read_certificates`].
    pub fn trust_file(mut self, path: impl AsRef<Path>) -> io::Result<Self> {
        trust_file(&mut self.roots, path.as_ref())?;
        Ok(self)
    }

    /// Asks clients for a certificate, but admits those that have none; one of a stranger is still refused.
    pub const fn admit_unknown(mut self) -> Self {
        self.admits_unknown = true;
        self
    }

    /// Speaks these application protocols, the best first (ALPN). A client that offers others only is refused; one that offers none is not.
    pub fn alpn(mut self, protocols: &[&str]) -> Self {
        self.alpn = protocols
            .iter()
            .map(|name| name.as_bytes().to_vec())
            .collect();
        self
    }

    /// The configuration; make it once and share it.
    ///
    /// # Errors
    /// `InvalidInput` if the identity's certificate and key do not belong together, or if a protocol's name is empty or longer than 255 bytes.
    pub fn build(self) -> io::Result<Arc<ServerConfig>> {
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| invalid(error.to_string()))?;
        let builder = if self.roots.is_empty() {
            builder.with_no_client_auth()
        } else {
            let mut clients =
                WebPkiClientVerifier::builder_with_provider(self.roots.into(), provider());
            if self.admits_unknown {
                clients = clients.allow_unauthenticated();
            }
            let clients = clients
                .build()
                .map_err(|error| invalid(error.to_string()))?;
            builder.with_client_cert_verifier(clients)
        };
        let Identity { chain, key, origin } = self.identity;
        let config = builder.with_single_cert(chain, key);
        let mut config = config.map_err(|error| unusable(&origin, &error))?;
        config.alpn_protocols = checked(self.alpn)?;
        Ok(Arc::new(config))
    }
}

/// A certificate, those that certify it, and its private key.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// For errors.
    origin: String,
}

impl Identity {
    /// The certificate stands first in `chain`; the authority at its end may be left out.
    #[must_use]
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Self {
        Self {
            chain,
            key,
            origin: "the certificate".to_owned(),
        }
    }

    /// From PEM files, which may be one and the same. Reads them on the spot.
    ///
    /// # Errors
    /// As [`read_certificates`] and [`read_private_key`].
    pub fn from_files(chain: impl AsRef<Path>, key: impl AsRef<Path>) -> io::Result<Self> {
        let (chain, key) = (chain.as_ref(), key.as_ref());
        Ok(Self {
            origin: format!("{} with {}", chain.display(), key.display()),
            chain: read_certificates(chain)?,
            key: read_private_key(key)?,
        })
    }
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self {
            chain: self.chain.clone(),
            key: self.key.clone_key(),
            origin: self.origin.clone(),
        }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({}, key not shown)", self.origin)
    }
}

/// Reads all certificates in a PEM file, on the spot.
///
/// # Errors
/// Those of reading it; `InvalidData` if it has none, or damaged ones. All name the file.
pub fn read_certificates(path: impl AsRef<Path>) -> io::Result<Vec<CertificateDer<'static>>> {
    let path = path.as_ref();
    let text = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if found.is_empty() => Err(pem::Error::NoItemsFound),
        found => found,
    }
    .map_err(|error| damaged(path, "certificate", &error))
}

/// Reads the first private key in a PEM file, on the spot: PKCS#8, PKCS#1 (RSA) or SEC1 (EC), not encrypted.
///
/// # Errors
/// Those of reading it; `InvalidData` if it has none, or a damaged one. All name the file.
pub fn read_private_key(path: impl AsRef<Path>) -> io::Result<PrivateKeyDer<'static>> {
    let path = path.as_ref();
    let text = read(path)?;
    PrivateKeyDer::from_pem_slice(&text)
        .map_err(|error| damaged(path, "unencrypted private key", &error))
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| {
        let text = format!("cannot read {}: {error}", path.display());
        io::Error::new(error.kind(), text)
    })
}

fn damaged(path: &Path, what: &str, error: &pem::Error) -> io::Error {
    let path = path.display();
    let text = match error {
        pem::Error::NoItemsFound => format!("{path} has no {what} in PEM form"),
        error => format!("{path} is damaged: {error}"),
    };
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn trust_file(roots: &mut RootCertStore, path: &Path) -> io::Result<()> {
    for authority in read_certificates(path)? {
        trust(
            roots,
            authority,
            &format!("a certificate in {}", path.display()),
        )?;
    }
    Ok(())
}

fn trust(
    roots: &mut RootCertStore,
    authority: CertificateDer<'static>,
    which: &str,
) -> io::Result<()> {
    roots.add(authority).map_err(|error| {
        let text = format!("{which} cannot be trusted: {error}");
        io::Error::new(io::ErrorKind::InvalidData, text)
    })
}

/// ALPN has a byte for each length, and no empty names.
fn checked(protocols: Vec<Vec<u8>>) -> io::Result<Vec<Vec<u8>>> {
    match protocols
        .iter()
        .find(|name| name.is_empty() || name.len() > 255)
    {
        None => Ok(protocols),
        Some(name) => Err(invalid(format!(
            "an application protocol's name has 1 to 255 bytes, not {}",
            name.len()
        ))),
    }
}

fn unusable(origin: &str, error: &rustls::Error) -> io::Error {
    invalid(format!("{origin} cannot be used for TLS: {error}"))
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

fn authorities(roots: RootCertStore) -> io::Result<Arc<WebPkiServerVerifier>> {
    let builder = WebPkiServerVerifier::builder_with_provider(roots.into(), provider());
    builder.build().map_err(|error| {
        invalid(format!(
            "a TLS client must trust somebody, call `trust_file`: {error}"
        ))
    })
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Checks less of a certificate than rustls would by itself: not the name, or nothing. That the server has the certificate's key is checked all the same.
#[derive(Debug)]
struct Lenient {
    /// `None` for any signer, known or not.
    authorities: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl Lenient {
    fn over(
        authorities: Option<Arc<WebPkiServerVerifier>>,
        builder: ConfigBuilder<ClientConfig, WantsVerifier>,
    ) -> ConfigBuilder<ClientConfig, WantsClientCert> {
        let provider = provider();
        let verifier = Arc::new(Self {
            authorities,
            provider,
        });
        builder
            .dangerous()
            .with_custom_certificate_verifier(verifier)
    }
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(authorities) = &self.authorities else {
            return Ok(ServerCertVerified::assertion());
        };
        let verified = authorities.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        match verified {
            // That is compared last, when all else was found right.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = &self.provider.signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}
