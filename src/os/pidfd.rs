//! Proof of life and death: descriptors that name a process, whatever becomes of its number.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Instant;

use nix::poll::PollFlags;
use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};

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

/// What tells a process from every other one that has or had its number since the machine was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Birth {
    /// The pidfd's inode: since Linux 6.9 each process has its own; before, all share one.
    inode: u64,
    /// When it was started, in clock ticks since the machine was; 0 where `/proc` does not show it to us.
    started_ticks: u64,
}

impl Birth {
    /// Whether both may be one process's. What `/proc` did not show once tells nothing: who may see a process changes with its user.
    pub(crate) fn may_be_same(self, other: Birth) -> bool {
        let ticks = [self.started_ticks, other.started_ticks];
        self.inode == other.inode && (ticks[0] == ticks[1] || ticks.contains(&0))
    }
}

/// What tells the living process `pid` from others.
pub(crate) fn birth(pid: u32, pidfd: BorrowedFd<'_>) -> io::Result<Birth> {
    let inode = fstat(pidfd.as_fd())?.st_ino;
    let stat = match fs::read(format!("/proc/{pid}/stat")) {
        Err(error) if is_hidden(&error) => Vec::new(),
        // Want of a descriptor, say, tells nothing about the process.
        other => other?,
    };
    Ok(Birth { inode, started_ticks: started_ticks(&stat).unwrap_or(0) })
}

/// Whether there is no such process, or not for us to see.
fn is_hidden(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied)
        || error.raw_os_error() == Some(libc::ESRCH)
}

/// The second field, the program's name, may hold anything, no text even; the 22nd is the start time.
fn started_ticks(stat: &[u8]) -> Option<u64> {
    let name_ends = stat.iter().rposition(|byte| *byte == b')')?;
    let fields = str::from_utf8(&stat[name_ends + 1..]).ok()?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// A pidfd of the process that had this number when `birth` was noted; `None` when that process is dead.
pub(crate) fn reopen(pid: u32, noted: Birth) -> io::Result<Option<OwnedFd>> {
    let pidfd = match open(pid) {
        Ok(pidfd) => pidfd,
        Err(error) => return if is_no_process(pid, &error) { Ok(None) } else { Err(error) },
    };
    let same = birth(pid, pidfd.as_fd())?.may_be_same(noted);
    Ok(if same && !is_dead(pidfd.as_fd())? { Some(pidfd) } else { None })
}

/// Whether a number from which no pidfd could be had is no process's. It may be a thread's by now: ENOENT, or EINVAL before there was that.
fn is_no_process(pid: u32, error: &io::Error) -> bool {
    match error.raw_os_error() {
        Some(libc::ESRCH) => true,
        // Of 0, a process that we do not see, it tells nothing.
        Some(libc::ENOENT | libc::EINVAL) => pid != 0,
        _ => false,
    }
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
    use std::io::{Read, Write};
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

    #[test]
    fn who_changes_its_name_or_cannot_be_looked_at_is_not_dead() {
        // As a name of 15 bytes that ends in the middle of a letter.
        let rename = r"read line; printf 'nam\303' > /proc/$$/comm; echo renamed; read line";
        let mut command = Command::new("sh");
        let mut child = command.args(["-c", rename]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        let noted = birth(pid, open(pid).unwrap().as_fd()).unwrap();
        child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
        assert!(reopen(pid, noted).unwrap().is_some(), "it lives under another name");
        // Noted while `/proc` did not show it to us: it has become another user since.
        assert!(reopen(pid, Birth { started_ticks: 0, ..noted }).unwrap().is_some(), "it lives as another user");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(reopen(pid, noted).unwrap().is_none());
    }

    #[test]
    fn a_number_that_is_a_threads_by_now_is_no_living_process() {
        let birth = birth(std::process::id(), open(std::process::id()).unwrap().as_fd()).unwrap();
        let found = std::thread::spawn(move || reopen(nix::unistd::gettid().as_raw() as u32, birth)).join().unwrap();
        assert!(found.unwrap().is_none());
    }

    #[test]
    fn the_dead_are_told_from_who_has_their_number_now() {
        let (us, pid) = (open(std::process::id()).unwrap(), std::process::id());
        let birth = birth(pid, us.as_fd()).unwrap();
        assert!(birth.started_ticks > 0);
        assert!(reopen(pid, birth).unwrap().is_some());
        let another = Birth { inode: birth.inode + 1, ..birth };
        assert!(reopen(pid, another).unwrap().is_none());
        let another = Birth { started_ticks: birth.started_ticks - 1, ..birth };
        assert!(reopen(pid, another).unwrap().is_none());
    }
}
