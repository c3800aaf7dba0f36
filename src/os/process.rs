//! Starting our own kind: the coordinator, its keeper, and a bus that outlives whoever started it.

use std::ffi::{CStr, OsStr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// The running program, also when its file was replaced meanwhile.
pub(crate) const OWN_PROGRAM: &str = "/proc/self/exe";

/// Runs `program` with exactly one descriptor of ours beside standard input, output and error, which it inherits.
pub(crate) fn spawn_with_fd<S: AsRef<OsStr>>(
    program: &Path,
    args: &[S],
    environment: &[(&str, &OsStr)],
    fd: BorrowedFd<'_>,
) -> io::Result<Child> {
    let raw = fd.as_raw_fd();
    let mut command = Command::new(program);
    command.arg0("shmbus").args(args).envs(environment.iter().copied()).stdin(Stdio::null());
    // SAFETY: between fork and exec only fcntl runs, which is async-signal-safe; `raw` stays open in the child because
    // `fd` is borrowed for the whole call.
    unsafe {
        command.pre_exec(move || match libc::fcntl(raw, libc::F_SETFD, 0) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    command.spawn()
}

/// Runs `program` in a session of its own, without a terminal, in the root directory.
pub(crate) fn spawn_detached<S: AsRef<OsStr>>(
    program: &Path,
    args: &[S],
    environment: &[(&str, &OsStr)],
) -> io::Result<Child> {
    let mut command = Command::new(program);
    command.arg0("shmbus").args(args).envs(environment.iter().copied()).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let no_signals = SigSet::empty();
    // SAFETY: between fork and exec only setsid and sigprocmask run, which are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            // Whoever starts it may have signals blocked (`without_signals`).
            no_signals.thread_set_mask()?;
            match libc::setsid() {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            }
        });
    }
    command.spawn()
}

/// From now on SIGTERM and SIGINT end nothing; they become readable on the descriptor returned.
pub(crate) fn termination_signals() -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

/// Allows as many descriptors as the system lets us: each topic takes three and more.
pub(crate) fn raise_descriptor_limit() -> io::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(())
}

/// How many descriptors this process may have.
pub(crate) fn descriptor_limit() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft)
}

/// Calls `start` with every signal blocked, so that a thread which it starts takes none.
pub(crate) fn without_signals<T>(start: impl FnOnce() -> T) -> T {
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
    let started = start();
    if let Ok(before) = before {
        // It was the mask a moment ago, so it can be again.
        let _ = before.thread_set_mask();
    }
    started
}

/// The name `ps` and `top` show; no use failing for it.
pub(crate) fn set_title(title: &CStr) {
    let _ = nix::sys::prctl::set_name(title);
}

/// The descriptor that [`spawn_with_fd`] left open for us, by the number in our arguments.
pub(crate) fn inherited(raw: RawFd) -> io::Result<OwnedFd> {
    if raw <= 2 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "standard descriptors are not handed over"));
    }
    // SAFETY: fcntl with F_SETFD only looks the number up; it fails where it names nothing.
    if unsafe { libc::fcntl(raw, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the number is open, and whoever started this process left it open for this call alone; it is made when
    // nothing else in the process has opened descriptors yet.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}
