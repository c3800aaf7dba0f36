//! Proof of life and death: descriptors that name a process, whatever becomes of its number.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Instant;

use nix::poll::PollFlags;
use nix::sys::stat::fstat;

use crate::os::socket;

/// A pidfd of the process that has this number now.
pub(crate) fn open(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor to us; nobody else owns it. Descriptors fit in an int.
    Ok(unsafe { OwnedFd::from_raw_fd(raw as RawFd) })
}

/// Whether the process has ended. The only proof of death there is; a hang-up or silence is none.
pub(crate) fn is_dead(pidfd: BorrowedFd<'_>) -> io::Result<bool> {
    socket::wait(pidfd, PollFlags::POLLIN, Some(Instant::now()))
}

/// Whether both may name one process. Since Linux 6.9 each process has its own inode and the answer is exact; before,
/// all pidfds share one inode and the caller must compare numbers of living processes as well.
pub(crate) fn may_be_same(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> io::Result<bool> {
    let (a, b) = (fstat(a.as_fd())?, fstat(b.as_fd())?);
    Ok((a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn tells_the_living_from_the_dead() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let pidfd = open(child.id()).unwrap();
        assert!(!is_dead(pidfd.as_fd()).unwrap());
        assert!(may_be_same(pidfd.as_fd(), open(child.id()).unwrap().as_fd()).unwrap());
        child.kill().unwrap();
        assert!(socket::wait(pidfd.as_fd(), PollFlags::POLLIN, None).unwrap());
        assert!(is_dead(pidfd.as_fd()).unwrap());
        child.wait().unwrap();
    }
}
