//! A process's address space, watched from outside: whether what it had mapped when we first looked is still there.
//!
//! A descriptor of `/proc/PID/maps` belongs to the address space that the process had when it was opened. Once the last
//! thread has left that space, by its end or because it executes another program, the space is torn down and reading
//! says "end of file", for good. Neither its number nor its name is asked, so there is nothing to be reused.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// The address space of the process that has this number now. Refused for processes we may not look into.
pub(crate) fn open(pid: u32) -> io::Result<OwnedFd> {
    Ok(File::open(format!("/proc/{pid}/maps"))?.into())
}

/// Whether nobody runs in it any more: no store of its former owner can follow. In doubt somebody does.
pub(crate) fn is_gone(space: BorrowedFd<'_>) -> bool {
    let look = || File::from(space.as_fd().try_clone_to_owned()?).read_at(&mut [0], 0);
    look().is_ok_and(|len| len == 0)
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
        let mut child = Command::new("sh").args(["-c", "read line; exec cat"]).stdin(Stdio::piped()).spawn().unwrap();
        let before = open(child.id()).unwrap();
        assert!(!is_gone(before.as_fd()));
        child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        assert!(goes(&before));
        assert!(child.try_wait().unwrap().is_none(), "it lives");
        let after = open(child.id()).unwrap();
        assert!(!is_gone(after.as_fd()));
        child.kill().unwrap();
        assert!(goes(&after));
        child.wait().unwrap();
    }
}
