//! TLS for `amqps`: what an address says of certificates, made into a configuration of rustls.
//!
//! The files are read for each search for a server, also when a lost connection is made again: certificates that were renewed
//! meanwhile are found.

use crate::uri::Uri;

use super::Options;
use super::error::Error;

/// How a connection is secured; there is none without the feature `tls`.
#[cfg(feature = "tls")]
pub(super) type Security = std::sync::Arc<kernel::net::tls::ClientConfig>;
#[cfg(not(feature = "tls"))]
pub(super) type Security = std::convert::Infallible;

/// `None` for `amqp://`.
pub(super) fn security(uri: &Uri, options: &Options) -> Result<Option<Security>, Error> {
    if !uri.tls {
        return Ok(None);
    }
    #[cfg(feature = "tls")]
    return match &options.tls {
        Some(given) => Ok(Some(given.0.clone())),
        None => match with_tls::config(&uri.tls_options) {
            Ok(config) => Ok(Some(config)),
            Err(error) => Err(Error::Certificates(error.to_string())),
        },
    };
    #[cfg(not(feature = "tls"))]
    {
        let _ = options;
        Err(Error::NoTls)
    }
}

#[cfg(feature = "tls")]
pub use with_tls::Tls;

#[cfg(feature = "tls")]
mod with_tls {
    use std::fmt;
    use std::io;
    use std::path::PathBuf;
    use std::sync::Arc;

    use kernel::net::tls::rustls::client::danger::{
        HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
    };
    use kernel::net::tls::rustls::crypto::{CryptoProvider, ring};
    use kernel::net::tls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use kernel::net::tls::rustls::{self, DigitallySignedStruct, SignatureScheme};
    use kernel::net::tls::{
        ClientConfig, ClientContext, Identity, read_certificates, read_private_key,
    };

    use crate::uri::{TlsOptions, Verify};

    /// A configuration of rustls to be used in place of the address's files; two are equal if they are the same.
    #[derive(Clone)]
    pub struct Tls(pub(super) Arc<ClientConfig>);

    impl From<Arc<ClientConfig>> for Tls {
        fn from(config: Arc<ClientConfig>) -> Self {
            Self(config)
        }
    }

    impl PartialEq for Tls {
        fn eq(&self, other: &Self) -> bool {
            Arc::ptr_eq(&self.0, &other.0)
        }
    }

    impl Eq for Tls {}

    impl fmt::Debug for Tls {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Tls(..)")
        }
    }

    /// Where systems keep the authorities that they trust: Debian, Fedora, openSUSE, Alpine and macOS.
    const SYSTEM: [&str; 4] = [
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
        "/etc/ssl/ca-bundle.pem",
        "/etc/ssl/cert.pem",
    ];

    pub(super) fn config(options: &TlsOptions) -> io::Result<Arc<ClientConfig>> {
        // The address's parser sees to it that there is none or both.
        let own = options.certfile.as_ref().zip(options.keyfile.as_ref());
        if options.verify == Verify::Nothing {
            let builder = ClientConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .map_err(io::Error::other)?
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Anybody(provider())));
            let config = match own {
                None => builder.with_no_client_auth(),
                Some((chain, key)) => builder
                    .with_client_auth_cert(read_certificates(chain)?, read_private_key(key)?)
                    .map_err(|error| {
                        let (chain, key) = (chain.display(), key.display());
                        io::Error::other(format!("{chain} with {key}: {error}"))
                    })?,
            };
            return Ok(Arc::new(config));
        }
        let trusted = match &options.cacertfile {
            Some(path) => path.clone(),
            None => system_authorities().ok_or_else(|| {
                let text = "this system has no list of authorities where it is looked for; name one with cacertfile or SSL_CERT_FILE";
                io::Error::new(io::ErrorKind::NotFound, text)
            })?,
        };
        let mut context = ClientContext::new().trust_file(trusted)?;
        if let Some((chain, key)) = own {
            context = context.identity(Identity::from_files(chain, key)?);
        }
        if options.verify == Verify::Authority {
            context = context.any_name();
        }
        context.build()
    }

    fn system_authorities() -> Option<PathBuf> {
        let named = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
        named.or_else(|| SYSTEM.into_iter().map(PathBuf::from).find(|p| p.exists()))
    }

    fn provider() -> Arc<CryptoProvider> {
        Arc::new(ring::default_provider())
    }

    /// `verify=verify_none`: takes any certificate, so that whoever sits between us and the server can pass for it. What is said is
    /// still hidden from those who only listen.
    #[derive(Debug)]
    struct Anybody(Arc<CryptoProvider>);

    impl ServerCertVerifier for Anybody {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, rustls::Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            let algorithms = &self.0.signature_verification_algorithms;
            rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            let algorithms = &self.0.signature_verification_algorithms;
            rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }
}
