//! `shmbus serve` under a service manager, which the test plays: the socket that it hands over, what it is told, and the
//! descriptors that it keeps while every process of the bus is dead.

mod common;

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{LIMIT, await_that, receive};
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, bind, listen, recvmsg, socket,
};
use nix::unistd::Pid;
use shmbus::{Bus, Start, Topic};

/// Descriptors for the service lie here until it is started, out of the way of those it expects.
const ASIDE: RawFd = 500;

/// What the manager knows of the service.
struct Manager {
    directory: tempfile::TempDir,
    notify: UnixDatagram,
    store: BTreeMap<String, OwnedFd>,
    said: Vec<String>,
    service: Option<Child>,
}

impl Manager {
    fn new() -> Manager {
        let directory = tempfile::Builder::new().prefix("shmbus-test-").tempdir().unwrap();
        std::fs::create_dir(directory.path().join("bus")).unwrap();
        let notify = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        notify.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
        Manager { directory, notify, store: BTreeMap::new(), said: Vec::new(), service: None }
    }

    fn place(&self) -> PathBuf {
        self.directory.path().join("bus")
    }

    fn open(&self) -> Bus {
        Bus::options().name("service").directory(self.place()).spawn(false).open().unwrap()
    }

    /// Starts the service with these descriptors, and waits until it says that it is up.
    fn start(&mut self, items: &[(&str, &OwnedFd)]) {
        let aside: Vec<OwnedFd> = items.iter().map(|(_, fd)| aside(fd)).collect();
        let names: Vec<&str> = items.iter().map(|(name, _)| *name).collect();
        let mut command = Command::new("sh");
        command.args(["-c", "LISTEN_PID=$$ exec \"$0\" --bus service serve", env!("CARGO_BIN_EXE_shmbus")]);
        command.env("SHMBUS_DIR", self.place()).env("NOTIFY_SOCKET", self.directory.path().join("notify"));
        command.env("LISTEN_FDS", items.len().to_string()).env("LISTEN_FDNAMES", names.join(":")).stdin(Stdio::null());
        let raw: Vec<RawFd> = aside.iter().map(AsRawFd::as_raw_fd).collect();
        // SAFETY: dup2 is async-signal-safe, and the descriptors stay open until the spawn is over.
        unsafe {
            command.pre_exec(move || {
                for (number, fd) in (3..).zip(&raw) {
                    if dup2(*fd, number) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        self.said.clear();
        self.service = Some(command.spawn().unwrap());
        self.await_word("READY=1");
    }

    /// Takes in what the service says until it has said this.
    fn await_word(&mut self, word: &str) {
        await_that(word, || {
            self.listen();
            self.said.iter().any(|said| said == word)
        });
    }

    fn listen(&mut self) {
        let mut buffer = [0; 512];
        loop {
            let mut space = nix::cmsg_space!([RawFd; 2]);
            let mut pieces = [IoSliceMut::new(&mut buffer)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let Ok(message) = recvmsg::<()>(self.notify.as_raw_fd(), &mut pieces, Some(&mut space), flags) else {
                return;
            };
            let mut fds = Vec::new();
            for part in message.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(raw) = part {
                    // SAFETY: the kernel has just given them to us.
                    fds.extend(raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
                }
            }
            let len = message.bytes;
            let text = String::from_utf8(buffer[..len].to_vec()).unwrap();
            let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).map(str::to_owned);
            match (text.contains("FDSTORE=1"), name) {
                (true, Some(name)) => drop(self.store.insert(name, fds.pop().unwrap())),
                (false, Some(name)) => drop(self.store.remove(&name)),
                _ => self.said.push(text),
            }
        }
    }

    /// The keeper is the process we started; the coordinator is its child.
    fn kill_everything(&mut self) {
        self.listen();
        let mut keeper = self.service.take().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", keeper.id());
        let coordinators = std::fs::read_to_string(children).unwrap();
        let pids = coordinators.split_whitespace().map(|pid| pid.parse().unwrap()).chain([keeper.id() as i32]);
        let pids: Vec<Pid> = pids.map(Pid::from_raw).collect();
        assert_eq!(pids.len(), 2);
        for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
            pids.iter().for_each(|pid| kill(*pid, signal).unwrap());
        }
        keeper.wait().unwrap();
        self.listen();
    }

    fn await_exit(&mut self) {
        let mut service = self.service.take().unwrap();
        await_that("the service's end", || {
            self.listen();
            service.try_wait().unwrap().is_some()
        });
        self.listen();
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if self.service.is_some() {
            self.kill_everything();
        }
    }
}

unsafe extern "C" {
    fn dup2(from: RawFd, to: RawFd) -> RawFd;
}

fn aside(fd: &OwnedFd) -> OwnedFd {
    let raw = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(ASIDE)).unwrap();
    // SAFETY: just made, for us.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

fn listener(path: &Path) -> OwnedFd {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&fd, Backlog::new(16).unwrap()).unwrap();
    fd
}

fn topic() -> Topic<[u8]> {
    Topic::new("kept").messages(16).bytes(4096)
}

#[test]
fn a_bus_outlives_all_of_its_processes_in_the_managers_store() {
    let mut manager = Manager::new();
    manager.start(&[]);
    let bus = manager.open();
    let mut publisher = bus.publisher(topic()).unwrap();
    let mut subscriber = bus.subscriber(topic()).open().unwrap();
    for life in 0..3 {
        publisher.publish_timeout(b"before", LIMIT).unwrap();
        let id = bus.topic("kept").unwrap().id;
        manager.kill_everything();
        publisher.publish_timeout(b"meanwhile", LIMIT).unwrap();
        let store = std::mem::take(&mut manager.store);
        let items: Vec<(&str, &OwnedFd)> = store.iter().map(|(name, fd)| (name.as_str(), fd)).collect();
        manager.start(&items);
        let status = bus.topic("kept").unwrap();
        assert_eq!((status.id, status.publishers.len(), status.subscribers.len()), (id, 1, 1), "{life}");
        assert_eq!(receive(&mut subscriber), (2 * life, b"before".to_vec()));
        assert_eq!(receive(&mut subscriber), (2 * life + 1, b"meanwhile".to_vec()));
        let mut late = manager.open().subscriber(topic()).start(Start::Last(1)).open().unwrap();
        assert_eq!(receive(&mut late), (2 * life + 1, b"meanwhile".to_vec()));
    }
    bus.stop().unwrap();
    manager.await_exit();
    assert!(manager.said.iter().any(|said| said == "STOPPING=1"));
    assert_eq!(manager.store.keys().collect::<Vec<_>>(), Vec::<&String>::new(), "the next bus is a new one");
    assert_eq!(std::fs::read_dir(manager.place()).unwrap().count(), 0);
}

#[test]
fn a_socket_that_is_handed_over_is_served_and_left_where_it_is() {
    let mut manager = Manager::new();
    let path = manager.place().join("service.sock");
    let listener = listener(&path);
    for _ in 0..2 {
        manager.start(&[("shmbus.socket", &listener)]);
        let (bus, stays) = (manager.open(), manager.open());
        bus.publisher(topic()).unwrap().publish(b"x").unwrap();
        bus.stop().unwrap();
        manager.await_exit();
        assert!(path.exists(), "it is the manager's");
        // A bus that has ended is not started again by those who were on it.
        let mut door = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut door, 200u16).unwrap(), 0, "somebody knocks");
        drop(stays);
        assert_eq!(std::fs::read_dir(manager.place()).unwrap().count(), 1);
    }
}

#[test]
fn what_the_manager_was_not_told_of_is_had_from_those_who_have_it() {
    let mut manager = Manager::new();
    manager.start(&[]);
    let bus = manager.open();
    manager.listen();
    let early = manager.store["registry"].try_clone().unwrap();
    // So many that the registry outgrows its file.
    for number in 0..1000 {
        bus.create(&Topic::<[u8]>::named(format!("many.{number}")).messages(16).bytes(4096)).unwrap();
        if number % 8 == 0 {
            manager.listen();
        }
    }
    let mut publisher = bus.publisher(topic()).unwrap();
    let mut subscriber = bus.subscriber(topic()).open().unwrap();
    publisher.publish(b"before").unwrap();
    let id = bus.topic("kept").unwrap().id;
    manager.kill_everything();
    let mut store = std::mem::take(&mut manager.store);
    let grown = store.insert("registry".to_owned(), early).unwrap();
    let len = |fd: &OwnedFd| nix::sys::stat::fstat(fd).unwrap().st_size;
    assert!(len(&grown) > len(&store["registry"]));
    drop(grown);
    store.retain(|name, _| !name.starts_with("topic-"));
    let items: Vec<(&str, &OwnedFd)> = store.iter().map(|(name, fd)| (name.as_str(), fd)).collect();
    manager.start(&items);
    let status = bus.topic("kept").unwrap();
    assert_eq!((status.id, status.publishers.len(), status.subscribers.len()), (id, 1, 1));
    publisher.publish(b"after").unwrap();
    assert_eq!(receive(&mut subscriber), (0, b"before".to_vec()));
    assert_eq!(receive(&mut subscriber), (1, b"after".to_vec()));
    assert_eq!(bus.topics().unwrap().len(), 1, "nobody had the others");
}
