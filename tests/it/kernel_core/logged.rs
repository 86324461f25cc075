//! What a test's thread logs.

use std::cell::RefCell;

use log::{Level, LevelFilter};

thread_local! {
    static LINES: RefCell<Option<(Level, Vec<String>)>> = const { RefCell::new(None) };
}

/// Keeps lines, and, as loggers that show the current task do, asks the kernel for it.
struct Recorder;

impl log::Log for Recorder {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        LINES.with_borrow_mut(|lines| {
            if let Some((level, lines)) = lines
                && record.level() <= *level
            {
                let _ = kernel::try_current_task().map(|task| format!("{task:?}"));
                let (level, target) = (record.level(), record.target());
                lines.push(format!("{level} {target} {}", record.args()));
            }
        });
    }
    fn flush(&self) {}
}

/// The lines that `f` logs in this thread at `level` and above: level, target, text.
pub(crate) fn lines_of(level: Level, f: impl FnOnce()) -> Vec<String> {
    let _ = log::set_logger(&Recorder);
    log::set_max_level(LevelFilter::Trace);
    LINES.set(Some((level, Vec::new())));
    f();
    LINES.take().expect("set above").1
}
