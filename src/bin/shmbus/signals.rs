//! Ctrl-C and SIGTERM: noticed between two messages, so that a command ends with everything it has taken written.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// The first signal that came; 0: none.
static CAUGHT: AtomicI32 = AtomicI32::new(0);

/// Readable from the first signal on: what a blocked read polls beside its input.
static WAKE: OnceLock<UnixStream> = OnceLock::new();

/// What is done, and then said, when a command cannot be ended tidily in time.
type LastResort = Box<dyn Fn() -> String + Send>;

/// A second Ctrl-C is one that comes at least this much later: `timeout` and terminals may send the first twice.
const SECOND: Duration = Duration::from_millis(500);

/// Catches Ctrl-C and SIGTERM from now on. A command that has not ended `grace` after the signal (it sits in a system
/// call or a full ring), or a second signal, ends the process after `last_resort`.
pub(crate) fn install(grace: Duration, last_resort: LastResort) -> io::Result<()> {
    let (wake, waker) = UnixStream::pair()?;
    let _ = WAKE.set(wake);
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let (noticed, first) = channel();
    let watch = std::thread::Builder::new().name("signals".into());
    watch.spawn(move || {
        for signal in signals.forever() {
            if noticed.send(signal).is_err() {
                return;
            }
        }
    })?;
    std::thread::Builder::new().name("last resort".into()).spawn(move || {
        let Ok(signal) = first.recv() else { return };
        CAUGHT.store(signal, Ordering::Relaxed);
        drop(waker); // end of file: `wake` polls readable from now on
        let came = Instant::now();
        while let Some(left) = grace.checked_sub(came.elapsed()) {
            if first.recv_timeout(left).is_ok() && came.elapsed() >= SECOND {
                break;
            }
        }
        let words = last_resort();
        if !words.is_empty() {
            eprintln!("shmbus: {words}");
        }
        std::process::exit(128 + signal);
    })?;
    Ok(())
}

/// The signal that asked this process to end.
pub(crate) fn caught() -> Option<i32> {
    match CAUGHT.load(Ordering::Relaxed) {
        0 => None,
        signal => Some(signal),
    }
}

/// Waits until `input` can be read without blocking. `false`: a signal came first.
pub(crate) fn wait_readable(input: BorrowedFd<'_>) -> io::Result<bool> {
    let Some(wake) = WAKE.get() else { return Ok(true) };
    let mut fds = [PollFd::new(input, PollFlags::POLLIN), PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => return Ok(!fds[1].any().unwrap_or(false)),
            Err(nix::errno::Errno::EINTR) => continue,
            Err(e) => return Err(e.into()),
        }
    }
}

/// Whether whoever read this pipe has gone; noticed without writing to it.
pub(crate) fn reader_is_gone(output: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(output, PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).is_ok()
        && fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR))
}
