//! The kernel as a guest of somebody else's loop.

use std::cell::{Cell, RefCell};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kernel::traps::future_wait;
use kernel::{Activation, Builder, Interrupt, Kernel, KernelView, sleep, spawn, yield_now};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use super::{Story, ms, virtual_kernel};

/// A foreign loop, in real time: it knows the kernel's descriptor and the deadline, and nothing else.
struct Host<'env> {
    kernel: Kernel<'env>,
    poll: Poll,
    turns: usize,
    /// Told when both it and the kernel sleep: what is sent from there on must wake them.
    asleep: mpsc::Sender<()>,
}

impl<'env> Host<'env> {
    fn new(asleep: mpsc::Sender<()>) -> Self {
        let kernel = Kernel::new().unwrap();
        let poll = Poll::new().unwrap();
        let fd = kernel.as_fd().as_raw_fd();
        poll.registry()
            .register(&mut SourceFd(&fd), Token(0), Interest::READABLE)
            .unwrap();
        Self {
            kernel,
            poll,
            turns: 0,
            asleep,
        }
    }

    fn run_until(&mut self, done: impl Fn() -> bool) {
        let mut events = Events::with_capacity(8);
        let limit = Instant::now() + Duration::from_secs(60);
        loop {
            let turn = self.kernel.turn(Some(Duration::ZERO)).unwrap();
            self.turns += 1;
            if done() {
                return;
            }
            assert!(Instant::now() < limit, "the host was not woken");
            let wait = match turn.next_deadline {
                _ if turn.ready => Duration::ZERO,
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
                None => {
                    let _ = self.asleep.send(());
                    limit.saturating_duration_since(Instant::now())
                }
            };
            self.poll.poll(&mut events, Some(wait)).unwrap();
        }
    }
}

/// Accepts: embed/host_epoll
#[test]
fn a_foreign_loop_hosts_the_kernel_by_descriptor_deadline_and_turn() {
    let done = Rc::new(Cell::new(0));
    let (sender, asleep) = mpsc::channel();
    let mut host = Host::new(sender);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (sender, receiver) = futures::channel::oneshot::channel();
    let count = |done: &Rc<Cell<i32>>| done.set(done.get() + 1);
    let counter = done.clone();
    host.kernel.spawn(async move {
        sleep(ms(5)).await.unwrap();
        count(&counter);
    });
    let counter = done.clone();
    host.kernel.spawn(async move {
        kernel::traps::read_wait(&ours).await.unwrap();
        count(&counter);
    });
    let counter = done.clone();
    host.kernel.spawn(async move {
        receiver.await.unwrap();
        count(&counter);
    });
    let remote = host.kernel.remote();
    let thread = std::thread::spawn(move || {
        // Each time after the last has been dealt with: only then does the kernel sleep again.
        asleep.recv().unwrap();
        theirs.write_all(b"x").unwrap();
        asleep.recv().unwrap();
        remote.call(|| drop(spawn(yield_now())));
        asleep.recv().unwrap();
        sender.send(()).unwrap();
        theirs
    });
    host.run_until(|| done.get() == 3);
    thread.join().unwrap();
    host.run_until(|| true);
    // It slept in between: a loop that spins would make thousands of turns in this time.
    assert!(host.turns < 100, "{} turns", host.turns);
}

fn is_readable(kernel: &Kernel<'_>) -> bool {
    is_fd_readable(kernel.as_fd().as_raw_fd())
}

fn is_fd_readable(fd: RawFd) -> bool {
    // A fresh registration is level-triggered in effect: it reports what is there already.
    let mut poll = Poll::new().unwrap();
    poll.registry()
        .register(&mut SourceFd(&fd), Token(0), Interest::READABLE)
        .unwrap();
    let mut events = Events::with_capacity(8);
    poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
    !events.is_empty()
}

/// A level-triggered host would spin on a bell that is never silenced, and sleep through one that is never rung.
///
/// Accepts: sweepea-defect/S13
#[test]
fn the_descriptor_is_readable_exactly_while_there_is_something_to_do() {
    let mut kernel = Kernel::new().unwrap();
    assert!(!is_readable(&kernel));
    // A turn waits no longer than it may, also if no deadline is near.
    assert_eq!(kernel.turn(Some(ms(1))).unwrap().polled, 0);
    let remote = kernel.remote();
    assert!(remote.call(|| {}));
    assert!(is_readable(&kernel), "before the first turn");
    kernel.turn(Some(Duration::ZERO)).unwrap();
    assert!(!is_readable(&kernel));
    remote.call(|| {});
    assert!(is_readable(&kernel));
    kernel.turn(Some(Duration::ZERO)).unwrap();
    assert!(!is_readable(&kernel), "silenced although there is no I/O");
    kernel.run(async {}).unwrap();
    remote.call(|| {});
    assert!(is_readable(&kernel), "after a run");
    // What wakes a task while the kernel runs rings no bell.
    kernel
        .run(async {
            let remote = kernel::traps::get_kernel().await;
            for _ in 0..10 {
                remote.call(|| {});
                spawn(sleep(Duration::ZERO)).join().await.unwrap().unwrap();
                let (sender, receiver) = futures::channel::oneshot::channel();
                let task = spawn(receiver);
                yield_now().await.unwrap();
                sender.send(()).unwrap();
                task.join().await.unwrap().unwrap();
            }
        })
        .unwrap();
    kernel.turn(Some(Duration::ZERO)).unwrap();
    assert!(!is_readable(&kernel));
    // What the host itself wakes between turns does.
    let lot = Rc::new(kernel::traps::Lot::new());
    let parked = lot.clone();
    let task = kernel
        .spawn(async move { kernel::traps::sched_wait(&parked, kernel::WaitKind::Event).await });
    kernel.turn(Some(Duration::ZERO)).unwrap();
    assert!(!is_readable(&kernel));
    kernel::traps::sched_wake(&lot, 1);
    assert!(is_readable(&kernel));
    kernel.turn(Some(Duration::ZERO)).unwrap();
    assert!(task.is_terminated());
}

/// What calls into its kernel just when that is about to sleep, as another thread may.
type Call = Box<dyn FnOnce()>;

struct Ringer(Rc<Cell<Option<Call>>>);

impl Activation for Ringer {
    fn idle(&mut self, _: &KernelView<'_>) {
        if let Some(call) = self.0.take() {
            call();
        }
    }
}

/// Lest the next sleep be over at once.
#[test]
fn what_rings_when_the_kernel_is_about_to_sleep_is_silenced_before_it_is_heard() {
    let call: Rc<Cell<Option<Call>>> = Rc::default();
    let ringer = Ringer(call.clone());
    let mut kernel = Builder::new().activation(ringer).build().unwrap();
    let (remote, fd) = (kernel.remote(), kernel.as_fd().as_raw_fd());
    let (sender, heard) = mpsc::channel();
    let main = async {
        for _ in 0..100 {
            yield_now().await.unwrap(); // the first look of a run silences whatever rang before
        }
        call.set(Some(Box::new(move || {
            let tell = move || sender.send(is_fd_readable(fd)).unwrap();
            assert!(remote.call(tell));
        })));
        sleep(ms(1)).await.unwrap();
    };
    kernel.run(main).unwrap();
    assert_eq!(heard.recv(), Ok(false));
}

#[test]
fn an_answer_on_credit_makes_the_descriptor_readable_when_it_is_paid_for() {
    let (mut kernel, _) = virtual_kernel();
    let kept = Rc::new(RefCell::new(None));
    let place = kept.clone();
    let task = kernel.spawn(future_wait(move |completer| {
        place.replace(Some(completer));
    }));
    kernel.turn(Some(Duration::ZERO)).unwrap();
    assert!(!is_readable(&kernel));
    let ring = kept.take().unwrap().complete_on_credit();
    assert!(!is_readable(&kernel));
    drop(ring.expect("the kernel waits for its host"));
    assert!(is_readable(&kernel));
    kernel.turn(Some(Duration::ZERO)).unwrap();
    assert!(task.is_terminated());
}

#[test]
fn what_is_woken_between_turns_goes_before_what_is_spawned_after() {
    let (mut kernel, _) = virtual_kernel();
    let (story, lot) = (Story::default(), Rc::new(kernel::traps::Lot::new()));
    let (teller, parked) = (story.clone(), lot.clone());
    kernel.spawn(async move {
        kernel::traps::sched_wait(&parked, kernel::WaitKind::Event)
            .await
            .unwrap();
        teller.tell("woken");
    });
    kernel.turn(Some(Duration::ZERO)).unwrap();
    kernel::traps::sched_wake(&lot, 1);
    let teller = story.clone();
    kernel.spawn(async move { teller.tell("spawned") });
    kernel.turn(Some(Duration::ZERO)).unwrap();
    story.assert(&["woken", "spawned"]);
}

/// Accepts: embed/fair_turn, sweepea-defect/S12
#[test]
fn one_turn_is_bounded_however_busy_the_guest_is() {
    let mut kernel = Kernel::new().unwrap();
    for _ in 0..1000 {
        kernel.spawn(async {
            loop {
                yield_now().await?;
            }
            #[expect(unreachable_code, reason = "names the type")]
            Ok::<(), Interrupt>(())
        });
    }
    let mut total = 0;
    for _ in 0..100 {
        let turn = kernel.turn(Some(Duration::ZERO)).unwrap();
        assert!(turn.ready);
        assert!((1..=61).contains(&turn.polled), "{}", turn.polled);
        total += turn.polled;
    }
    // Nobody is passed over.
    let cycles: Vec<_> = kernel.tasks().iter().map(|task| task.cycles).collect();
    assert_eq!(cycles.iter().sum::<u32>() as usize, total);
    assert!(cycles.iter().max().unwrap() - cycles.iter().min().unwrap() <= 1);
    // How many it polls depends on the time that they take; here they take none.
    for (tasks, polled) in [(10, 10), (61, 61), (1000, 61)] {
        let (mut kernel, _) = virtual_kernel();
        for _ in 0..tasks {
            kernel.spawn(yield_now());
        }
        let turn = kernel.turn(Some(Duration::ZERO)).unwrap();
        assert_eq!(turn.polled, polled);
    }
    // A single spinning task is polled once a turn.
    let mut kernel = Kernel::new().unwrap();
    kernel.spawn(async {
        loop {
            yield_now().await?;
        }
        #[expect(unreachable_code, reason = "names the type")]
        Ok::<(), Interrupt>(())
    });
    for _ in 0..10 {
        assert_eq!(kernel.turn(Some(Duration::ZERO)).unwrap().polled, 1);
    }
}
