//! A process's address space, watched from outside: whether what it had mapped when we first looked is still there.
//!
//! A descriptor of `/proc/PID/pagemap` belongs to the address space that the process had when it was opened. Once the last
//! thread has left that space, by its end or because it executes another program, the space is torn down and reading
//! says "end of file", for good. Neither its number nor its name is asked, so there is nothing to be reused.
//!
//! Entries of a pagemap have eight bytes, so to read one byte of it is refused, after the look whether the space is still
//! there and before the lock is taken that guards it. `/proc/PID/maps` tells the same, but takes that lock, which the
//! process can keep busy for seconds.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// What shows it, the best first: a kernel may have no pagemaps, and who may trace all processes need not be allowed to
/// open files of other users.
const VIEWS: [&str; 2] = ["pagemap", "maps"];

/// The address space of the process that has this number now. Refused for processes we may not look into.
pub(crate) fn open(pid: u32) -> io::Result<OwnedFd> {
    let [first, second] = VIEWS;
    let space = view(pid, first).or_else(|_| view(pid, second))?;
    // Of a process whose first thread has ended alone nothing is shown, though the others run on there.
    if is_gone(space.as_fd()) { Err(io::Error::from_raw_os_error(libc::ESRCH)) } else { Ok(space) }
}

fn view(pid: u32, name: &str) -> io::Result<OwnedFd> {
    Ok(File::open(format!("/proc/{pid}/{name}"))?.into())
}

/// Whether nobody runs in it any more: no store of its former owner can follow. In doubt somebody does.
pub(crate) fn is_gone(space: BorrowedFd<'_>) -> bool {
    look(space).is_ok_and(|len| len == 0)
}

/// One byte of it.
fn look(space: BorrowedFd<'_>) -> io::Result<usize> {
    File::from(space.try_clone_to_owned()?).read_at(&mut [0], 0)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    fn goes(space: &OwnedFd) -> bool {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !is_gone(space.as_fd()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        is_gone(space.as_fd())
    }

    #[test]
    fn goes_with_an_exec_though_the_process_lives() {
        // Kernels without pagemaps have but the second view.
        VIEWS.into_iter().filter(|name| view(std::process::id(), name).is_ok()).for_each(goes_with_an_exec_in);
    }

    fn goes_with_an_exec_in(name: &str) {
        let mut child = Command::new("sh").args(["-c", "read line; exec cat"]).stdin(Stdio::piped()).spawn().unwrap();
        let before = view(child.id(), name).unwrap();
        assert!(!is_gone(before.as_fd()));
        child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        assert!(goes(&before));
        assert!(child.try_wait().unwrap().is_none(), "it lives");
        let after = view(child.id(), name).unwrap();
        assert!(!is_gone(after.as_fd()));
        child.kill().unwrap();
        // A zombie, first.
        assert!(goes(&after));
        child.wait().unwrap();
    }

    #[test]
    fn is_looked_at_without_its_lock() {
        let own = open(std::process::id()).unwrap();
        // What is refused has come to no page, and so to no lock.
        let refused = look(own.as_fd()).map_err(|error| error.raw_os_error());
        let has_pagemaps = view(std::process::id(), VIEWS[0]).is_ok();
        assert_eq!(refused, if has_pagemaps { Err(Some(libc::EINVAL)) } else { Ok(1) });
    }
}
