//! Task-local values: who sees which, and when they go. On the virtual clock.

use std::cell::Cell;
use std::future::{Future, pending};
use std::rc::Rc;
use std::time::Duration;

use futures::future::join;
use kernel::local::OutsideTask;
use kernel::{
    Builder, Interrupt, Kernel, RunError, TaskGroup, TaskLocal, VirtualClock, Wait, run_in_thread,
    sleep, spawn, spawn_thread, thread, timeout_after, yield_now,
};

static NUMBER: TaskLocal<u32> = TaskLocal::new();
static NAME: TaskLocal<String> = TaskLocal::new();

fn new_kernel<'env>() -> Kernel<'env> {
    let builder = Builder::new().clock(VirtualClock::new());
    builder.build().unwrap()
}

fn run<T>(main: impl Future<Output = T>) -> T {
    new_kernel().run(main).unwrap()
}

/// Accepts: curio-old/local/smoketest
#[test]
fn a_value_is_set_read_replaced_and_taken_away() {
    run(async {
        assert_eq!(NUMBER.get(), None);
        assert_eq!(NUMBER.set(1), None);
        assert_eq!(NUMBER.get(), Some(1));
        // Another of the same type is another, and so is one on the stack.
        let other = TaskLocal::new();
        assert_eq!(other.get(), None);
        other.set(10);
        NAME.set("one".into());
        assert_eq!(NUMBER.set(2).as_deref(), Some(&1));
        yield_now().await.unwrap();
        assert_eq!((NUMBER.get(), other.get()), (Some(2), Some(10)));
        NAME.with(|name| assert_eq!(name.unwrap(), "one"));
        assert_eq!(NUMBER.unset().as_deref(), Some(&2));
        assert_eq!((NUMBER.get(), NUMBER.unset()), (None, None));
        assert_eq!(
            (other.get(), NAME.get().unwrap().as_str()),
            (Some(10), "one")
        );
        // What is looked at may be replaced meanwhile.
        let length = NAME.with(|name| {
            NAME.set("another".into());
            name.unwrap().len()
        });
        assert_eq!((length, NAME.get().unwrap().len()), (3, 7));
        assert_eq!(format!("{other:?}"), "TaskLocal(Some(10))");
    });
}

/// Two count down beside each other, and `sleep(0)` gives each its turn.
///
/// Accepts: curio/task/contextvars, curio-old/local/isolation
#[test]
fn tasks_do_not_see_what_their_siblings_and_children_set() {
    let seen = Rc::new(std::cell::RefCell::new(Vec::new()));
    run(async {
        NUMBER.set(100);
        let counters = ["a", "b", "c"].map(|label| {
            let seen = seen.clone();
            spawn(async move {
                assert_eq!(NUMBER.get(), Some(100));
                NUMBER.set(3);
                while let Some(n @ 1..) = NUMBER.get() {
                    seen.borrow_mut().push(format!("{label}{n}"));
                    NUMBER.set(n - 1);
                    sleep(Duration::ZERO).await.unwrap();
                }
            })
        });
        for counter in &counters {
            counter.join().await.unwrap();
        }
        assert_eq!(NUMBER.get(), Some(100));
    });
    let expected = ["a3", "b3", "c3", "a2", "b2", "c2", "a1", "b1", "c1"];
    assert_eq!(*seen.borrow(), expected);
}

/// Accepts: curio/task/contextvars, curio-old/local/inheritance
#[test]
fn a_child_starts_with_its_parents_values_as_they_were_when_it_was_spawned() {
    run(async {
        let early = spawn(async { NUMBER.get() });
        NUMBER.set(1);
        NAME.set("parent".into());
        let child = spawn(async {
            let at_first = NUMBER.get();
            sleep(Duration::from_secs(1)).await.unwrap();
            let grandchild = spawn(async { (NUMBER.get(), NAME.get()) });
            (at_first, NUMBER.get(), grandchild.join().await.unwrap())
        });
        NUMBER.set(2); // before the child has run, and after it was spawned
        NAME.unset();
        assert_eq!(early.join().await.unwrap(), None);
        let name = Some("parent".to_string());
        let all_one = (Some(1), Some(1), (Some(1), name));
        assert_eq!(child.join().await.unwrap(), all_one);
        // Members of a group are children as well, and one that was adopted is whose it was.
        let mut group = TaskGroup::new(Wait::All);
        group.spawn(async { Ok::<_, Interrupt>(NUMBER.get()) });
        group.adopt(spawn(async { Ok(NUMBER.get()) }));
        group.spawn_thread(|| thread::run(async || Ok(NUMBER.get())));
        for (_, number) in group.join().await.unwrap().results {
            assert_eq!(number.unwrap(), Some(2));
        }
    });
}

/// Accepts: curio-old/local/nested_curio
#[test]
fn values_do_not_leak_between_kernels() {
    let mut guest = new_kernel();
    run(async {
        NUMBER.set(1);
        // One that runs on another thread, one that is refused here, and one that runs here as a guest.
        let there = run_in_thread(|| run(async { (NUMBER.get(), NUMBER.set(2).is_some()) })).await;
        assert_eq!(there, Ok((None, false)));
        assert!(matches!(kernel::run(async {}), Err(RunError::Reentrant)));
        let task = guest.spawn(async {
            let before = NUMBER.get();
            NUMBER.set(3);
            yield_now().await.unwrap();
            let child = spawn(async { NUMBER.get() });
            (before, NUMBER.get(), child.join().await.unwrap())
        });
        while !task.is_terminated() {
            guest.turn(Some(Duration::ZERO)).unwrap();
            assert_eq!(NUMBER.get(), Some(1));
        }
        let inside = task.try_join().unwrap().unwrap();
        assert_eq!(inside, (None, Some(3), Some(3)));
    });
    // One kernel after the other, and one main task after the other.
    let mut kernel = new_kernel();
    for round in 0..3 {
        kernel
            .run(async { assert_eq!((NUMBER.get(), NUMBER.set(round)), (None, None)) })
            .unwrap();
    }
    // Another thread's call has no task whose values it could have.
    let (sender, receiver) = std::sync::mpsc::channel();
    run(async {
        NUMBER.set(1);
        let remote = kernel::traps::get_kernel().await;
        remote.call(move || {
            spawn(async move { sender.send((NUMBER.get(),)).unwrap() });
        });
        sleep(Duration::from_secs(1)).await.unwrap();
    });
    assert_eq!(receiver.recv().unwrap(), (None,));
}

/// Accepts: curio-old/local/within_thread
#[test]
fn an_async_thread_sees_the_values_of_its_task() {
    run(async {
        NUMBER.set(1);
        let thread = spawn_thread(|| {
            let number = || thread::run(async || Ok::<_, Interrupt>(NUMBER.get()));
            let inherited = number()?;
            thread::run(async || {
                NUMBER.set(2);
                Ok::<_, Interrupt>(())
            })?;
            Ok::<_, Interrupt>((inherited, number()?))
        });
        NUMBER.set(3);
        let seen = thread.join().await.unwrap();
        assert_eq!(seen, Ok((Some(1), Some(2))));
        assert_eq!(NUMBER.get(), Some(3));
    });
}

/// Accepts: curio-old/local/outside_context
#[test]
fn outside_a_task_there_are_no_values_and_the_error_says_so() {
    fn is_refused() {
        assert_eq!(
            NUMBER.try_with(|_| unreachable!()),
            Err::<(), _>(OutsideTask)
        );
        for used in [
            || assert_eq!(NUMBER.get(), None),
            || drop(NUMBER.set(1)),
            || drop(NUMBER.unset()),
        ] {
            let panic = std::panic::catch_unwind(used).unwrap_err();
            let text = panic.downcast_ref::<String>().unwrap();
            assert_eq!(text, &OutsideTask.to_string());
        }
        assert!(OutsideTask.to_string().contains("none runs on this thread"));
    }
    is_refused();
    // A thread has no task of its own, nor has a call from elsewhere.
    run(async {
        NUMBER.set(1);
        run_in_thread(is_refused).await.unwrap();
        kernel::traps::get_kernel().await.call(is_refused);
        yield_now().await.unwrap();
        sleep(Duration::from_secs(1)).await.unwrap();
        assert_eq!(NUMBER.get(), Some(1));
    });
    let scoped = NUMBER.scope(1, async {});
    let polled = std::panic::AssertUnwindSafe(|| futures::executor::block_on(scoped));
    assert!(std::panic::catch_unwind(polled).is_err());
}

#[test]
fn a_scope_holds_for_its_future_alone_however_that_ends() {
    run(async {
        NUMBER.set(1);
        let body = NUMBER.scope(2, async {
            assert_eq!(NUMBER.get(), Some(2));
            let child = spawn(async { NUMBER.get() });
            yield_now().await.unwrap();
            assert_eq!(NUMBER.set(3).as_deref(), Some(&2));
            yield_now().await.unwrap();
            let nested = NUMBER.scope(4, async { NUMBER.get() });
            (nested.await, NUMBER.get(), child.join().await.unwrap())
        });
        let beside = async {
            for _ in 0..3 {
                assert_eq!(NUMBER.get(), Some(1));
                yield_now().await.unwrap();
            }
        };
        let (inside, ()) = join(body, beside).await;
        assert_eq!(inside, (Some(4), Some(3), Some(2)));
        assert_eq!(NUMBER.get(), Some(1));
        // By a panic.
        let mut panics = Box::pin(NUMBER.scope(2, async { panic!("inside") }));
        let poll = std::panic::AssertUnwindSafe(async { panics.as_mut().await });
        let panic = futures::FutureExt::catch_unwind(poll).await;
        assert!(panic.is_err());
        assert_eq!(NUMBER.get(), Some(1));
        // By being dropped, which happens inside of it.
        struct Look<'a>(&'a Cell<Option<u32>>);
        impl Drop for Look<'_> {
            fn drop(&mut self) {
                self.0.set(NUMBER.get());
            }
        }
        let seen = Cell::new(None);
        let look = Look(&seen);
        let waits = NUMBER.scope(5, async {
            let _look = look;
            kernel::interruptible(pending::<()>()).await
        });
        let late = timeout_after(Duration::from_secs(1), waits).await;
        assert_eq!(late, Err(Interrupt::TaskTimeout));
        assert_eq!((seen.take(), NUMBER.get()), (Some(5), Some(1)));
        let mut waits = Box::pin(NUMBER.scope(6, {
            let look = Look(&seen);
            async move {
                let _look = look;
                pending::<()>().await;
            }
        }));
        assert!(futures::poll!(&mut waits).is_pending());
        drop(waits);
        assert_eq!((seen.get(), NUMBER.get()), (Some(6), Some(1)));
        // With no value outside.
        NUMBER.unset();
        assert_eq!(NUMBER.scope(7, async { NUMBER.get() }).await, Some(7));
        assert_eq!(NUMBER.get(), None);
    });
}

/// Tells when it is dropped, and asks the kernel something at that.
struct Token(Rc<Cell<usize>>);

impl Drop for Token {
    fn drop(&mut self) {
        // No table may be borrowed now.
        drop(kernel::try_current_task().map(|task| task.info()));
        self.0.set(self.0.get() + 1);
    }
}

#[test]
fn a_value_goes_when_the_last_task_that_has_it_ends() {
    static TOKEN: TaskLocal<Token> = TaskLocal::new();
    let gone = Rc::new(Cell::new(0));
    let mut kernel = new_kernel();
    kernel
        .run(async {
            TOKEN.set(Token(gone.clone()));
            let sleeper = spawn(sleep(Duration::from_secs(1)));
            drop(TOKEN.unset());
            assert_eq!(gone.get(), 0, "the child has it");
            sleeper.join().await.unwrap().unwrap();
            assert_eq!(gone.get(), 1);
            // However a task ends.
            let [cancelled, aborted, panicked] = ["cancel", "abort", "panic"].map(|how| {
                let gone = gone.clone();
                spawn(async move {
                    TOKEN.set(Token(gone));
                    sleep(Duration::from_secs(1)).await?;
                    panic!("{how}");
                    #[expect(unreachable_code, reason = "names the type")]
                    Ok::<_, Interrupt>(())
                })
            });
            yield_now().await.unwrap();
            cancelled.cancel().await.unwrap();
            assert_eq!(gone.get(), 2);
            aborted.abort();
            assert_eq!(gone.get(), 3);
            assert!(panicked.join().await.is_err());
            assert_eq!(gone.get(), 4);
            // The next task in the same place begins with nothing.
            let next = spawn(async { TOKEN.with(|token| token.is_none()) });
            assert!(next.join().await.unwrap());
            // A destructor's panic ends with it.
            struct Bomb;
            impl Drop for Bomb {
                fn drop(&mut self) {
                    panic!("in the destructor of a value");
                }
            }
            static BOMB: TaskLocal<Bomb> = TaskLocal::new();
            let task = spawn(async { drop(BOMB.set(Bomb)) });
            task.join().await.unwrap();
            TOKEN.set(Token(gone.clone()));
            spawn(pending::<()>());
        })
        .unwrap();
    assert_eq!(
        gone.get(),
        4,
        "one that is left alone in the kernel has it still"
    );
    drop(kernel);
    assert_eq!(gone.get(), 5);
}

#[test]
fn a_value_is_a_keys_own_whoever_is_first_to_use_it() {
    // Two threads race for the key of each.
    for _ in 0..200 {
        let local: &'static TaskLocal<u32> = Box::leak(Box::default());
        let start = &std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            for n in 0..2 {
                scope.spawn(move || {
                    run(async {
                        start.wait();
                        local.set(n);
                        assert_eq!(local.get(), Some(n));
                    });
                });
            }
        });
    }
}
