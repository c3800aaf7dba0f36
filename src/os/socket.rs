//! Unix seqpacket sockets: one packet is one message, descriptors ride along, a hang-up is told.
//!
//! Every socket is non-blocking and closed on exec. Whoever wants to wait calls [`wait`] with a deadline.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, SockFlag, SockType, UnixAddr,
    accept4, bind, getsockname, getsockopt, listen as listen_on, recvmsg, sendmsg, socket, socketpair, sockopt,
};

use crate::os::pidfd;

/// Longest path of a Unix socket in bytes.
pub(crate) const MAX_PATH_BYTES: usize = 107;

/// Most descriptors the kernel takes in one packet (SCM_MAX_FD).
const KERNEL_MAX_FDS: usize = 253;

/// Connections that may wait to be accepted (the kernel caps it at net.core.somaxconn).
pub(crate) const BACKLOG: i32 = 4096;

/// The peer's supplementary groups (asm-generic/socket.h; Linux 4.13).
const SO_PEERGROUPS: libc::c_int = 59;

/// Who is at the other end, by the kernel's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) pid: u32,
    pub(crate) uid: u32,
}

/// A user with all his groups, by the kernel's word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gids: Vec<u32>,
}

/// Supplementary groups that are looked at; whoever has more has none for us.
const MAX_GROUPS: usize = 1024;

/// One packet.
pub(crate) struct Packet {
    /// Bytes written to the caller's buffer; 0 means that the other end hung up.
    pub(crate) len: usize,
    pub(crate) fds: Vec<OwnedFd>,
    /// The packet was longer than the buffer.
    pub(crate) truncated: bool,
    /// It carried more descriptors than asked for, or than this process may have.
    pub(crate) lost_fds: bool,
}

/// Binds and listens. The caller holds the directory's lock and has removed a stale socket.
pub(crate) fn listen(path: &Path) -> io::Result<OwnedFd> {
    let fd = seqpacket()?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen_on(&fd, Backlog::new(BACKLOG)?)?;
    Ok(fd)
}

/// Connects; `WouldBlock` when the listener's backlog is full.
pub(crate) fn connect(path: &Path) -> io::Result<OwnedFd> {
    let fd = seqpacket()?;
    nix::sys::socket::connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}

/// The next waiting connection, if any.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let raw = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    Ok(own(raw))
}

/// Two connected ends.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?)
}

/// Sends one packet or nothing; `WouldBlock` when the other end's buffer is full.
pub(crate) fn send(fd: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    loop {
        match sendmsg::<UnixAddr>(fd.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// How long a datagram waits for room at its receiver.
const DATAGRAM_PATIENCE: Duration = Duration::from_secs(1);

/// The same, waiting a moment for room.
pub(crate) fn send_waiting(fd: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    match send(fd, bytes, fds) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            wait(fd, PollFlags::POLLOUT, Some(Instant::now() + DATAGRAM_PATIENCE))?;
            send(fd, bytes, fds)
        }
        other => other,
    }
}

/// Whether this is a socket that listens at `path`, as a service manager hands it over; makes it non-blocking, like all
/// of ours.
pub(crate) fn adopt_listener(fd: BorrowedFd<'_>, path: &Path) -> io::Result<bool> {
    let is_ours = getsockopt(&fd, sockopt::SockType)? == SockType::SeqPacket
        && getsockopt(&fd, sockopt::AcceptConn)?
        && getsockname::<UnixAddr>(fd.as_raw_fd())?.path() == Some(path);
    if is_ours {
        let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
        fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    }
    Ok(is_ours)
}

/// Receives one packet into `buffer`, with at most `max_fds` descriptors; `WouldBlock` when there is none.
pub(crate) fn recv(fd: BorrowedFd<'_>, buffer: &mut [u8], max_fds: usize) -> io::Result<Packet> {
    let mut control = vec![0; control_len(max_fds)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    loop {
        let mut pieces = [IoSliceMut::new(buffer)];
        match recvmsg::<UnixAddr>(fd.as_raw_fd(), &mut pieces, Some(&mut control), flags) {
            Ok(message) => {
                let mut fds = Vec::new();
                // A truncated control message still names the descriptors that fitted: take them, or they leak.
                for part in message.cmsgs().into_iter().flatten() {
                    if let ControlMessageOwned::ScmRights(raw) = part {
                        fds.extend(raw.into_iter().map(own));
                    }
                }
                let truncated = message.flags.contains(MsgFlags::MSG_TRUNC);
                let lost_fds = message.flags.contains(MsgFlags::MSG_CTRUNC);
                return Ok(Packet { len: message.bytes, fds, truncated, lost_fds });
            }
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits until `fd` has one of `events` (or hangs up); false when `deadline` passes first.
pub(crate) fn wait(fd: BorrowedFd<'_>, events: PollFlags, deadline: Option<Instant>) -> io::Result<bool> {
    loop {
        let timeout = match deadline {
            None => PollTimeout::NONE,
            Some(deadline) => round_up(deadline.saturating_duration_since(Instant::now())),
        };
        match poll(&mut [PollFd::new(fd, events)], timeout) {
            Ok(0) if deadline.is_some_and(|d| Instant::now() >= d) => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Ends the connection both ways, also where a forked child still has a copy of the descriptor.
pub(crate) fn shut_down(fd: BorrowedFd<'_>) {
    // The other end may have done so already.
    let _ = nix::sys::socket::shutdown(fd.as_raw_fd(), Shutdown::Both);
}

/// The peer's process and user, as they were when it connected.
pub(crate) fn peer(fd: BorrowedFd<'_>) -> io::Result<Peer> {
    let credentials = getsockopt(&fd, sockopt::PeerCredentials)?;
    Ok(Peer { pid: u32::try_from(credentials.pid()).unwrap_or(0), uid: credentials.uid() })
}

/// The peer's user and groups, as they were when it connected.
pub(crate) fn user(fd: BorrowedFd<'_>) -> io::Result<User> {
    let credentials = getsockopt(&fd, sockopt::PeerCredentials)?;
    let mut gids = vec![credentials.gid()];
    let mut groups = [0; MAX_GROUPS];
    let mut len = size_of_val(&groups) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes of numbers to `groups`, and how many it were to `len`.
    let outcome = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, SO_PEERGROUPS, groups.as_mut_ptr().cast(), &raw mut len)
    };
    if outcome == 0 {
        gids.extend(groups.iter().take(len as usize / size_of::<libc::gid_t>()));
    }
    Ok(User { uid: credentials.uid(), gids })
}

/// Whether the other end is closed, though what it sent may still be unread.
pub(crate) fn is_hung_up(fd: BorrowedFd<'_>) -> bool {
    let closed = PollFlags::from_bits_retain(libc::POLLRDHUP);
    wait(fd, closed, Some(Instant::now())).unwrap_or(true)
}

/// A pidfd of the peer. Kernels before 6.5 cannot say it of the socket, so there it is opened by number: whoever asks
/// must check afterwards that the peer [has not hung up](is_hung_up). Were it dead and its number given away, it would
/// have, unless a child that it forked still has the socket.
pub(crate) fn peer_pidfd(fd: BorrowedFd<'_>, peer: Peer) -> io::Result<OwnedFd> {
    match getsockopt(&fd, sockopt::PeerPidfd) {
        Err(Errno::ENOPROTOOPT | Errno::EINVAL) => pidfd::open(peer.pid),
        other => Ok(other?),
    }
}

/// A poll timeout, never rounded down to a shorter wait.
pub(crate) fn round_up(wait: std::time::Duration) -> PollTimeout {
    let ms = wait.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128);
    PollTimeout::try_from(ms as i32).unwrap_or(PollTimeout::MAX)
}

fn seqpacket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?)
}

/// Room for one SCM_RIGHTS message of that many descriptors.
fn control_len(max_fds: usize) -> usize {
    if max_fds == 0 {
        return 0;
    }
    let payload = (max_fds.min(KERNEL_MAX_FDS) * size_of::<RawFd>()) as u32;
    // SAFETY: CMSG_SPACE only computes; it reads no memory.
    unsafe { libc::CMSG_SPACE(payload) as usize }
}

fn own(raw: RawFd) -> OwnedFd {
    // SAFETY: `raw` was just handed to this process by the kernel (accept4, SCM_RIGHTS) and nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

/// Whether nobody listens there.
pub(crate) fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::os::memfd;

    #[test]
    fn a_packet_carries_bytes_and_descriptors() {
        let (a, b) = pair().unwrap();
        let memory = memfd::create("shmbus-test", 4096).unwrap();
        send(a.as_fd(), b"hello", &[memory.as_fd(), memory.as_fd()]).unwrap();
        let mut buffer = [0; 16];
        let packet = recv(b.as_fd(), &mut buffer, 4).unwrap();
        assert_eq!((&buffer[..packet.len], packet.fds.len(), packet.truncated), (&b"hello"[..], 2, false));
        File::from(memory).write_all_at(b"x", 0).unwrap();
        let mut byte = [0];
        File::from(packet.fds.into_iter().next().unwrap()).read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn unwanted_descriptors_and_long_packets_are_marked() {
        let (a, b) = pair().unwrap();
        let memory = memfd::create("shmbus-test", 4096).unwrap();
        let mut buffer = [0; 4];
        send(a.as_fd(), b"fd", &[memory.as_fd()]).unwrap();
        let packet = recv(b.as_fd(), &mut buffer, 0).unwrap();
        assert!(packet.lost_fds && packet.fds.is_empty());
        send(a.as_fd(), b"too long", &[]).unwrap();
        assert!(recv(b.as_fd(), &mut buffer, 0).unwrap().truncated);
    }

    #[test]
    fn an_empty_socket_would_block_and_a_closed_one_says_so() {
        let (a, b) = pair().unwrap();
        let mut buffer = [0; 4];
        assert_eq!(recv(b.as_fd(), &mut buffer, 0).err().unwrap().kind(), io::ErrorKind::WouldBlock);
        let soon = Instant::now() + Duration::from_millis(2);
        assert!(!wait(b.as_fd(), PollFlags::POLLIN, Some(soon)).unwrap());
        drop(a);
        assert!(wait(b.as_fd(), PollFlags::POLLIN, None).unwrap());
        assert_eq!(recv(b.as_fd(), &mut buffer, 0).unwrap().len, 0);
        assert_eq!(send(b.as_fd(), b"x", &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
