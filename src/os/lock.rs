//! Advisory file locks that outlive the process that took them: they belong to the open file description.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Takes the exclusive lock; false when another open file description has it. Whoever holds a duplicate of `fd` holds
/// the lock too, and it ends with the last of them.
pub(crate) fn try_exclusive(fd: BorrowedFd<'_>) -> io::Result<bool> {
    loop {
        // SAFETY: flock takes two integers; `fd` is borrowed and therefore open.
        if unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::WouldBlock => return Ok(false),
            io::ErrorKind::Interrupted => {}
            _ => return Err(error),
        }
    }
}
