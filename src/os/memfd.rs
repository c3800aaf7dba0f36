//! Anonymous shared memory: created, reserved in full, sealed (ARCHITECTURE.md §3).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fchmod, fstat};
use nix::unistd::ftruncate;

use crate::os::process::without_signals;

/// Longest name the kernel shows for a memfd (`/proc/PID/fd`), in bytes.
const MAX_LABEL_BYTES: usize = 200;

/// Memory that takes longer to free than a thread takes to start.
const MUCH_BYTES: u64 = 1 << 20;

/// Its length stays, and so do its seals.
const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_SEAL);

/// A memfd of exactly `len` bytes, all zero. Its memory is reserved now, so that a later write cannot meet SIGBUS for
/// want of memory, and its length is sealed, so that nobody who holds the descriptor can pull it from under a mapping.
pub(crate) fn create(name: &str, len: u64) -> io::Result<OwnedFd> {
    let fd = begin(name, len)?;
    if len > 0 {
        reserve(fd.as_fd(), 0, len)?;
    }
    Ok(fd)
}

/// A memfd of exactly `len` bytes, sealed, whose memory is still to be [`reserve`]d.
pub(crate) fn begin(name: &str, len: u64) -> io::Result<OwnedFd> {
    let file_len = i64::try_from(len).map_err(|_| io::Error::from(Errno::EFBIG))?;
    let fd = open_sealable(name)?;
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    ftruncate(&fd, file_len)?;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SEALS))?;
    Ok(fd)
}

/// Reserves a range of it, inside its length.
pub(crate) fn reserve(fd: BorrowedFd<'_>, from: u64, len: u64) -> io::Result<()> {
    Ok(retry(|| fallocate(fd, FallocateFlags::empty(), from as i64, len as i64))?)
}

/// The same memory through a descriptor that cannot write. A new open file description, not a duplicate: a duplicate
/// would share the writable one's mode.
pub(crate) fn read_only(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    Ok(open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// The same memory through a descriptor that can write, from any that only reads. It takes the right to open the file, which
/// its owner has.
pub(crate) fn read_write(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    Ok(open(path.as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// Whether this is a memfd sealed as [`create`] does it; what it is instead, where not.
pub(crate) fn check_sealed(fd: BorrowedFd<'_>) -> Result<(), String> {
    match fcntl(fd, FcntlArg::F_GET_SEALS) {
        Ok(found) if found & SEALS.bits() == SEALS.bits() => Ok(()),
        Ok(found) => Err(format!("its seals are {found:#x}, expected {:#x}", SEALS.bits())),
        Err(error) => Err(format!("it is no memfd: {error}")),
    }
}

/// Whether this is memory of the kernel's own, sealed or not. Asks no file system.
pub(crate) fn is_memory(fd: BorrowedFd<'_>) -> bool {
    fcntl(fd, FcntlArg::F_GET_SEALS).is_ok()
}

/// Bytes of memory that a file takes.
pub(crate) fn held_bytes(fd: BorrowedFd<'_>) -> u64 {
    fstat(fd).map_or(0, |status| status.st_blocks as u64 * 512)
}

/// Lets go of much memory on a thread of its own: to free a gigabyte takes the kernel 50 ms. `bytes`: about how much it is.
pub(crate) fn free_elsewhere<T: Send + 'static>(bytes: u64, memory: T) {
    if bytes >= MUCH_BYTES {
        // Without a thread it is freed here.
        let _ = on_a_thread("shmbus-freeing", move || drop(memory));
    }
}

/// Starts a thread that takes no signals: they are the program's.
fn on_a_thread(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(64 << 10);
    without_signals(|| thread.spawn(work)).map(drop)
}

/// Closes files of which nobody knows how long that takes, on a thread of its own.
pub(crate) fn close_elsewhere(fds: Vec<OwnedFd>) {
    // Without a thread they stay open: better than to wait for whoever made them.
    let fds = std::mem::ManuallyDrop::new(fds);
    let _ = on_a_thread("shmbus-closing", move || drop(std::mem::ManuallyDrop::into_inner(fds)));
}

/// Creates the memfd; without `NOEXEC_SEAL` where the kernel is older than 6.3.
fn open_sealable(name: &str) -> io::Result<OwnedFd> {
    let label: String = name.chars().filter(|c| *c != '\0').take(MAX_LABEL_BYTES).collect();
    let label = CString::new(label).map_err(|_| io::Error::from(Errno::EINVAL))?;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let no_exec = flags | MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL);
    match memfd_create(label.as_c_str(), no_exec) {
        Err(Errno::EINVAL) => Ok(memfd_create(label.as_c_str(), flags)?),
        other => Ok(other?),
    }
}

/// Reserving much memory takes long enough to be interrupted by a signal.
fn retry(mut call: impl FnMut() -> nix::Result<()>) -> nix::Result<()> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn is_reserved_sealed_and_private() {
        let file = File::from(create("shmbus-test", 10_000).unwrap());
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), 10_000);
        assert_eq!(metadata.mode() & 0o777, 0o600);
        assert!(metadata.blocks() * 512 >= 10_000, "memory is reserved before use");
        assert!(file.set_len(5_000).is_err());
        assert!(file.set_len(20_000).is_err());
    }

    #[test]
    fn a_read_only_descriptor_reads_and_cannot_write() {
        let file = File::from(create("shmbus-test", 4096).unwrap());
        file.write_all_at(b"hello", 0).unwrap();
        let mut reader = File::from(read_only(file.as_fd()).unwrap());
        let mut bytes = [0; 5];
        reader.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"hello");
        assert!(reader.write_all(b"x").is_err());
    }

    #[test]
    fn too_much_is_an_error_not_a_crash() {
        assert!(create("shmbus-test", u64::MAX).is_err());
    }
}
