//! What `tests/run` tells the tests.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;

/// Where the olive binary is.
#[track_caller]
pub(crate) fn olive() -> PathBuf {
    told("SWEEPEA_TEST_OLIVE").into()
}

/// The Python interpreter that has pika, kombu, celery and Curio.
#[track_caller]
pub(crate) fn python() -> PathBuf {
    told("SWEEPEA_TEST_PYTHON").into()
}

/// `embedded`, or the URL of a RabbitMQ node.
#[track_caller]
pub(crate) fn broker() -> String {
    told("SWEEPEA_TEST_BROKER")
        .into_string()
        .expect("the broker's URL is UTF-8")
}

/// The folder of `rabbitmq-server` and its tools; Debian's, unless told otherwise.
pub(crate) fn rabbitmq() -> PathBuf {
    env::var_os("SWEEPEA_RABBITMQ_SBIN")
        .unwrap_or_else(|| "/usr/lib/rabbitmq/bin".into())
        .into()
}

#[track_caller]
fn told(name: &str) -> OsString {
    env::var_os(name)
        .unwrap_or_else(|| panic!("{name} is not set: run the integration tests with tests/run"))
}
