//! What this kernel can do, and in which state other processes are; for `shmbus doctor`.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{getsockopt, sockopt};

use crate::os::{membarrier, pidfd, socket};

/// Major and minor version of the running kernel.
pub(crate) fn kernel_version() -> Option<(u32, u32)> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

pub(crate) fn has_pidfd() -> bool {
    pidfd::open(std::process::id()).is_ok()
}

pub(crate) fn has_peer_pidfd() -> bool {
    socket::pair().is_ok_and(|(a, _)| getsockopt(&a, sockopt::PeerPidfd).is_ok())
}

pub(crate) fn has_membarrier() -> bool {
    membarrier::is_available()
}

pub(crate) fn has_noexec_memfd() -> bool {
    memfd_create(c"shmbus-probe", MFdFlags::MFD_CLOEXEC | MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL)).is_ok()
}

pub(crate) fn has_futex_waitv() -> bool {
    // SAFETY: no futexes to wait for and no pointer to follow: the kernel says EINVAL, or that it has no such call.
    let refused =
        unsafe { libc::syscall(libc::SYS_futex_waitv, std::ptr::null::<u8>(), 0, 0, std::ptr::null::<u8>(), 0) };
    refused != -1 || Errno::last() != Errno::ENOSYS
}

/// Most descriptors that a process of this user may have.
pub(crate) fn descriptor_limit() -> Option<u64> {
    getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(_, hard)| hard)
}

/// The chosen word of a setting such as `always [never]`.
pub(crate) fn chosen(setting: &str) -> Option<String> {
    let text = fs::read_to_string(setting).ok()?;
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}

/// The letter that the kernel gives a process's state: T is stopped, Z and X are dead. `None`: there is none.
pub(crate) fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it may hold anything, parentheses as well.
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Processes that have this file open, as far as we may look.
pub(crate) fn openers(path: &Path) -> Vec<u32> {
    let (Ok(file), Ok(processes)) = (fs::metadata(path), fs::read_dir("/proc")) else { return Vec::new() };
    let is_it = |entry: &fs::DirEntry| {
        fs::metadata(entry.path()).is_ok_and(|open| (open.dev(), open.ino()) == (file.dev(), file.ino()))
    };
    let has_it = |pid: &u32| {
        fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|mut open| open.any(|entry| entry.is_ok_and(|e| is_it(&e))))
    };
    processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(has_it).collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn sees_itself_and_the_dead() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(openers(file.path()), [std::process::id()]);
        assert!(matches!(state(std::process::id()), Some('R' | 'S')));
        let mut child = Command::new("true").stdin(Stdio::null()).spawn().unwrap();
        let pid = child.id();
        child.wait().unwrap();
        assert_eq!(state(pid), None);
        assert!(kernel_version().unwrap() >= (3, 0));
    }
}
