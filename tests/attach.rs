//! Stand-alone channels: two processes and a descriptor, and what is refused as one.

mod common;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::thread;

use common::{LIMIT, receive};
use nix::fcntl::{FcntlArg, FdFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use shmbus::{AttachError, Channel, ChannelError, GoneReason, Mode, PublishError, RecvError, Topic};

const TOPIC: Topic<[u8]> = Topic::new("attach").messages(16).bytes(4096);

/// Where the segment header's fields lie (ARCHITECTURE.md §3.1).
const MAGIC: u64 = 0;
const LAYOUT: u64 = 8;
const KIND: u64 = 12;
const SLOTS: u64 = 48;

fn memory(len: u64, seals: SealFlag) -> File {
    let fd = memfd_create(c"shmbus-test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let file = File::from(fd);
    file.set_len(len).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    file
}

fn sealed() -> SealFlag {
    SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL
}

/// A copy of a good channel with some bytes of it changed.
fn forged(at: u64, bytes: &[u8]) -> OwnedFd {
    let channel = Channel::create(TOPIC).unwrap();
    let original = File::from(channel.as_fd().try_clone_to_owned().unwrap());
    let mut content = vec![0; original.metadata().unwrap().len() as usize];
    original.read_exact_at(&mut content, 0).unwrap();
    content[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    let copy = memory(content.len() as u64, sealed());
    copy.write_all_at(&content, 0).unwrap();
    copy.into()
}

fn refused(topic: Topic<[u8]>, fd: OwnedFd) -> (AttachError, String) {
    match Channel::attach(topic, fd) {
        Err(ChannelError::Attach(error)) => {
            let text = ChannelError::Attach(error);
            let said = text.to_string();
            let ChannelError::Attach(error) = text else { unreachable!() };
            (error, said)
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("attached to something else"),
    }
}

#[test]
fn a_copy_of_a_channel_is_one() {
    let channel = Channel::attach(TOPIC, forged(MAGIC, b"SHMBUS\0\x01")).unwrap();
    let (mut publisher, mut subscriber) = (channel.publisher().unwrap(), channel.subscriber().unwrap());
    publisher.publish(b"hello").unwrap();
    assert_eq!(receive(&mut subscriber), (0, b"hello".to_vec()));
}

#[test]
fn descriptors_of_other_things_are_refused() {
    let (error, said) = refused(TOPIC, File::open("/dev/null").unwrap().into());
    assert!(matches!(error, AttachError::TooSmall { found: 0, min: 4096 }), "{error:?}");
    assert_eq!(said, "cannot attach to the channel: segment of 0 bytes; at least 4096 expected");

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, vec![0; 100_000]).unwrap();
    let (error, said) = refused(TOPIC, File::open(&path).unwrap().into());
    assert!(matches!(error, AttachError::Io { .. } | AttachError::NotSealed { .. }), "{error:?}");
    assert!(said.contains("seal"), "{said}");

    let (reader, _writer) = std::io::pipe().unwrap();
    let (error, _) = refused(TOPIC, reader.into());
    assert!(matches!(error, AttachError::TooSmall { .. }), "{error:?}");

    // Everything right but the right to write.
    let channel = Channel::create(TOPIC).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&channel.as_fd()));
    let (error, said) = refused(TOPIC, File::open(path).unwrap().into());
    assert!(matches!(error, AttachError::Io { context: "cannot map the segment", .. }), "{error:?}");
    assert!(said.contains("ermission denied"), "{said}");
}

#[test]
fn segments_of_another_make_are_refused() {
    let channel = Channel::create(TOPIC).unwrap();
    let len = File::from(channel.as_fd().try_clone_to_owned().unwrap()).metadata().unwrap().len();

    let (error, _) = refused(TOPIC, memory(4095, sealed()).into());
    assert!(matches!(error, AttachError::TooSmall { found: 4095, min: 4096 }), "{error:?}");
    for seals in [SealFlag::empty(), SealFlag::F_SEAL_SHRINK, SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL] {
        let (error, said) = refused(TOPIC, memory(len, seals).into());
        let found = seals.bits() as u32;
        assert!(matches!(error, AttachError::NotSealed { found: f, expected: 6 } if f == found), "{error:?}");
        assert!(said.contains("is not sealed against resizing"), "{said}");
    }
    let (error, _) = refused(TOPIC, memory(len + 4096, sealed()).into());
    let AttachError::Field { field: "length", found, expected } = error else { panic!("{error:?}") };
    assert_eq!((found, expected), (len + 4096, len));

    let (error, said) = refused(TOPIC, memory(len, sealed()).into());
    assert!(matches!(error, AttachError::Magic { found: 0, .. }), "{error:?}");
    assert!(said.contains("not a shmbus segment"), "{said}");
    let (error, _) = refused(TOPIC, forged(MAGIC, b"GARBAGE!"));
    assert!(matches!(error, AttachError::Magic { .. }), "{error:?}");
    let (error, said) = refused(TOPIC, forged(LAYOUT, &99u32.to_le_bytes()));
    assert!(matches!(error, AttachError::Version { found: 99, .. }), "{error:?}");
    assert!(said.contains("layout version 99") && said.contains("same shmbus version on both sides"), "{said}");
    let (error, _) = refused(TOPIC, forged(KIND, &2u32.to_le_bytes()));
    assert!(matches!(error, AttachError::Field { field: "kind", found: 2, expected: 5 }), "{error:?}");
    let (error, _) = refused(TOPIC, forged(SLOTS, &u64::MAX.to_le_bytes()));
    assert!(matches!(error, AttachError::Field { field: "slots", found: u64::MAX, expected: 16 }), "{error:?}");
}

#[test]
fn other_options_are_refused() {
    for topic in [TOPIC.messages(32), TOPIC.bytes(8192), TOPIC.messages(8).bytes(4000)] {
        let channel = Channel::create(TOPIC).unwrap();
        let (error, said) = refused(topic, channel.as_fd().try_clone_to_owned().unwrap());
        let AttachError::Field { found, expected, .. } = error else { panic!("{error:?}") };
        assert!(found != expected && said.contains(&format!("is {found}, expected {expected}")), "{said}");
    }
    // Another type has slots of another size.
    let channel = Channel::create(Topic::<u64>::new("attach")).unwrap();
    let (error, _) = refused(Topic::new("attach"), channel.as_fd().try_clone_to_owned().unwrap());
    assert!(matches!(error, AttachError::Field { .. }), "{error:?}");
    let outcome = Channel::create(TOPIC.messages(0));
    assert!(matches!(outcome, Err(ChannelError::Options(_))), "{:?}", outcome.err());
}

/// Content that no sender writes: an error, not a crash, and never a message.
#[test]
fn garbage_in_the_slots_is_reported() {
    // The body begins at 4,096, its slots 4,096 further on; a word is position, tenancy, kind and length.
    let word = |kind: u64, len: u64| (kind << 6 | len).to_le_bytes();
    for (kind, len, span) in [(1, 63, 0u64), (2, 0, u64::MAX), (2, 0, 1 << 20)] {
        let mut slot = word(kind, len).to_vec();
        slot.extend(span.to_le_bytes());
        let channel = Channel::attach(TOPIC, forged(8192, &slot)).unwrap();
        let mut subscriber = channel.subscriber().unwrap();
        let outcome = subscriber.recv_timeout(LIMIT).map(|message| message.sequence());
        assert!(matches!(outcome, Err(RecvError::Corrupt(_))), "{outcome:?}");
    }
}

#[test]
fn each_end_is_taken_once_and_its_end_is_told() {
    let channel = Channel::create(TOPIC).unwrap();
    let again = Channel::attach(TOPIC, channel.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let mut publisher = channel.publisher().unwrap();
    let mut subscriber = again.subscriber().unwrap();
    for channel in [&channel, &again] {
        let outcome = channel.publisher().err().unwrap();
        assert!(matches!(outcome, ChannelError::Taken("publisher")), "{outcome}");
        assert!(outcome.to_string().contains("has its publisher already"), "{outcome}");
        assert!(matches!(channel.subscriber().err(), Some(ChannelError::Taken("subscriber"))));
    }
    publisher.publish(b"last").unwrap();
    drop(publisher);
    assert_eq!(receive(&mut subscriber), (0, b"last".to_vec()));
    let outcome = subscriber.recv().map(|message| message.sequence());
    assert_eq!(outcome, Err(RecvError::Gone(GoneReason::Closed)));
    assert!(matches!(again.publisher().err(), Some(ChannelError::Taken("publisher"))), "taken is taken");

    let channel = Channel::create(TOPIC).unwrap();
    let (mut publisher, subscriber) = (channel.publisher().unwrap(), channel.subscriber().unwrap());
    let waiting = thread::spawn(move || {
        loop {
            if let Err(error) = publisher.publish(b"x") {
                return error;
            }
        }
    });
    drop(subscriber);
    assert_eq!(waiting.join().unwrap(), PublishError::Gone(GoneReason::Closed));
}

/// Not a test: the other process of the one below. It finds the channel on descriptor 0.
#[test]
fn role() {
    if common::role().is_none() {
        return;
    }
    let fd = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let mut publisher = Channel::attach(TOPIC, fd).unwrap().publisher().unwrap();
    for number in 0..10_000u64 {
        let len = [8, 56, 57, 1000][number as usize % 4];
        publisher.publish(&number.to_le_bytes().repeat(len / 8 + 1)[..len]).unwrap();
    }
}

/// Killed when its test is over: a sender alone cannot know.
struct Sender(Child);

impl Drop for Sender {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn two_processes_that_share_a_descriptor_share_a_channel() {
    let channel = Channel::create(TOPIC).unwrap();
    assert_eq!(TOPIC.channel().options().mode, Mode::Channel);
    let fd = channel.as_fd().try_clone_to_owned().unwrap();
    assert!(FdFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFD).unwrap()).contains(FdFlag::FD_CLOEXEC));
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "role"]).env("SHMBUS_TEST_ROLE", "publish").env("SHMBUS_TEST_ARGUMENTS", "");
    let child = command.stdin(Stdio::from(fd)).stdout(Stdio::null()).spawn().unwrap();
    let mut child = Sender(child);
    let mut subscriber = channel.subscriber().unwrap();
    for number in 0..10_000u64 {
        let len = [8, 56, 57, 1000][number as usize % 4];
        let (sequence, payload) = receive(&mut subscriber);
        assert_eq!(sequence, number);
        assert_eq!(payload, number.to_le_bytes().repeat(len / 8 + 1)[..len]);
    }
    let outcome = subscriber.recv_timeout(LIMIT).map(|message| message.sequence());
    assert_eq!(outcome, Err(RecvError::Gone(GoneReason::Closed)));
    assert!(child.0.wait().unwrap().success());
}
