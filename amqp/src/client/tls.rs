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

    use kernel::net::tls::{ClientConfig, ClientContext, Identity};

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
        let context = ClientContext::new();
        let mut context = match options.verify {
            Verify::Name => context.trust_file(authorities(options)?)?,
            Verify::Authority => context.trust_file(authorities(options)?)?.any_name(),
            Verify::Nothing => context.dangerously_trust_anybody(),
        };
        if let Some((chain, key)) = own {
            context = context.identity(Identity::from_files(chain, key)?);
        }
        context.build()
    }

    /// Those that the address names, or else the system's.
    fn authorities(options: &TlsOptions) -> io::Result<PathBuf> {
        let named = options.cacertfile.clone();
        let named = named.or_else(|| std::env::var_os("SSL_CERT_FILE").map(PathBuf::from));
        let found = named.or_else(|| SYSTEM.into_iter().map(PathBuf::from).find(|p| p.exists()));
        found.ok_or_else(|| {
            let text = "this system has no list of authorities where it is looked for; name one with cacertfile or SSL_CERT_FILE";
            io::Error::new(io::ErrorKind::NotFound, text)
        })
    }
}
