//! The kernel on one thread and tokio on another; each awaits what the other does.
//!
//! `cargo run -p sweepea-kernel --example beside_tokio`

use std::time::Duration;

use kernel::traps::get_kernel;
use kernel::{Interrupt, interruptible, sleep};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinHandle};

/// Tokio on a thread of its own until this is dropped.
pub(crate) struct Tokio {
    pub(crate) handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Tokio {
    pub(crate) fn start() -> std::io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || drop(runtime.block_on(stopped)));
        Ok(Self {
            handle,
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Tokio {
    fn drop(&mut self) {
        self.stop = None; // which answers as well
        if let Some(thread) = self.thread.take() {
            thread.join().expect("tokio contains its tasks' panics");
        }
    }
}

/// Waits for a task of tokio's, in a task of ours; its panic is an error here. If the wait is interrupted or dropped, tokio's task is aborted: without this it would
/// go on.
///
/// # Errors
/// The caller's [`Interrupt`].
pub(crate) async fn join<T>(theirs: JoinHandle<T>) -> Result<Result<T, JoinError>, Interrupt> {
    struct AbortOnDrop<T>(JoinHandle<T>);
    impl<T> Drop for AbortOnDrop<T> {
        fn drop(&mut self) {
            self.0.abort();
        }
    }
    let mut theirs = AbortOnDrop(theirs);
    interruptible(&mut theirs.0).await
}

pub(crate) fn main() -> Result<(), Box<dyn std::error::Error>> {
    let tokio = Tokio::start()?;
    kernel::run(async {
        // Ours awaits theirs.
        let theirs = tokio.handle.spawn(async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            "slept in tokio"
        });
        println!("{}", join(theirs).await??);

        // Theirs awaits ours.
        let kernel = get_kernel().await;
        let theirs = tokio.handle.spawn(async move {
            let ours = kernel.spawn(async || sleep(Duration::from_millis(10)).await.map(drop));
            ours.await
                .map(|slept| slept.map(|()| "slept in the kernel"))
        });
        println!("{}", join(theirs).await????);
        Ok(())
    })?
}
