//! How each runtime is set up: its quickest configuration for one thread, and the same for every bench.
//!
//! The work always runs in a spawned task, for no runtime is at its best in the future that is given to `block_on`: tokio, for one, visits its
//! I/O driver each time that future yields.

use crate::harness::Error;

/// The kernel.
pub(super) fn ours<T: 'static>(main: impl Future<Output = T> + 'static) -> Result<T, Error> {
    Ok(kernel::run(async { kernel::spawn(main).join().await })??)
}

#[cfg(feature = "peers")]
pub(super) use peers::*;

#[cfg(feature = "peers")]
mod peers {
    use super::*;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    /// tokio's `LocalRuntime`: the current-thread scheduler itself takes futures that are not `Send`.
    pub(in super::super) fn tokio<T: 'static>(
        main: impl Future<Output = T> + 'static,
    ) -> Result<T, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(THREADS)
            .build_local(tokio::runtime::LocalOptions::default())?;
        Ok(runtime.block_on(async { tokio::task::spawn_local(main).await })?)
    }

    /// tokio with a `LocalSet`, the older way and the one most programs still use. Neither is the quicker one everywhere, so both take part.
    pub(in super::super) fn tokio_local_set<T: 'static>(
        main: impl Future<Output = T> + 'static,
    ) -> Result<T, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let set = tokio::task::LocalSet::new();
        Ok(set.block_on(&runtime, async { tokio::task::spawn_local(main).await })?)
    }

    /// smol's executor, which spawns through a handle that tasks carry with them.
    pub(in super::super) type Smol = &'static async_executor::StaticLocalExecutor;

    /// smol: the leaked `StaticLocalExecutor`, which keeps no list of its tasks and so beats `LocalExecutor`; async-io's `block_on` runs the
    /// reactor on this same thread.
    pub(in super::super) fn smol<T: 'static, F: Future<Output = T> + 'static>(
        main: impl FnOnce(Smol) -> F,
    ) -> Result<T, Error> {
        let executor = async_executor::LocalExecutor::new().leak();
        let main = executor.spawn(main(executor));
        Ok(async_io::block_on(executor.run(main)))
    }

    /// monoio on io_uring.
    pub(in super::super) fn monoio_uring<T: 'static>(
        main: impl Future<Output = T> + 'static,
    ) -> Result<T, Error> {
        if !monoio::utils::detect_uring() {
            return Err("this kernel or its settings forbid io_uring".into());
        }
        let mut runtime = monoio::RuntimeBuilder::<monoio::IoUringDriver>::new()
            .enable_timer()
            .attach_thread_pool(Box::new(monoio::blocking::DefaultThreadPool::new(THREADS)))
            .build()?;
        Ok(runtime.block_on(async { monoio::spawn(main).await }))
    }

    /// monoio on epoll, which it calls the legacy driver.
    pub(in super::super) fn monoio_epoll<T: 'static>(
        main: impl Future<Output = T> + 'static,
    ) -> Result<T, Error> {
        let mut runtime = monoio::RuntimeBuilder::<monoio::LegacyDriver>::new()
            .enable_timer()
            .attach_thread_pool(Box::new(monoio::blocking::DefaultThreadPool::new(THREADS)))
            .build()?;
        Ok(runtime.block_on(async { monoio::spawn(main).await }))
    }

    /// glommio, which has io_uring only. Unbound, because the process is pinned already.
    pub(in super::super) fn glommio<T: 'static>(
        main: impl Future<Output = T> + 'static,
    ) -> Result<T, Error> {
        let executor = glommio::LocalExecutorBuilder::new(glommio::Placement::Unbound)
            .make()
            .map_err(|error| format!("no executor, io_uring may be forbidden: {error}"))?;
        Ok(executor.run(async { glommio::spawn_local(main).await }))
    }

    /// Threads of the pools whose size is ours to choose.
    const THREADS: usize = 2;

    /// Wakes itself and is ready at the second poll. For peers whose own way to yield does something else: tokio's goes round by the I/O driver
    /// first, glommio's yields only when a time slice is over.
    #[derive(Default)]
    pub(in super::super) struct YieldOnce(bool);

    impl Future for YieldOnce {
        type Output = ();

        fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
            if self.0 {
                return Poll::Ready(());
            }
            self.0 = true;
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    }
}
