//! The kernel beside other runtimes, each bench with all its contestants in one file.

mod echo;
mod ping_pong;
mod runtimes;
mod sleeps;
mod spawn;
mod thread_pool;
mod timeout;
mod r#yield;

use crate::harness::Bench;

pub(crate) fn benches() -> Vec<Bench> {
    vec![
        spawn::in_batches(),
        spawn::one_by_one(),
        r#yield::a_thousand_tasks(),
        ping_pong::over_queues(),
        timeout::set_and_cancelled(),
        sleeps::many(),
        sleeps::memory(),
        echo::over(1),
        echo::over(64),
        echo::over(1000),
        thread_pool::one_at_a_time(),
        thread_pool::many_in_flight(),
    ]
}
