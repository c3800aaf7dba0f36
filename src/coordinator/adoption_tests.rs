//! What a coordinator takes from participants, and what it refuses, without processes.

use super::*;
use crate::coordinator::estate::Estate;
use crate::coordinator::registry::Registry;
use crate::coordinator::state::PublisherEntry;
use crate::os::memfd;
use crate::topic::TopicOptions;

/// A bus with one topic, which has lost its keeper and coordinator.
struct Wreck {
    state: State,
    segments: BTreeMap<String, OwnedFd>,
    store: BTreeMap<String, OwnedFd>,
}

impl Wreck {
    fn new() -> Wreck {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("b.registry");
        let mut estate = Estate::found(7, Some(&path)).unwrap();
        let us = estate.admit_us();
        let options = TopicOptions { messages: 16, bytes: 4096, ..TopicOptions::default() };
        let create =
            Request::CreateTopic { topic: "t".to_owned(), options, access: None, exist_ok: false, ephemeral: false };
        estate.request(us, &create).unwrap();
        let stored = estate.stored().into_iter();
        let segments = stored.filter_map(|(name, fd)| Some((name.strip_prefix("topic-0/")?.to_owned(), fd)));
        let segments = segments.map(|(name, fd)| (name, fd.try_clone_to_owned().unwrap())).collect();
        let registry = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let (_, events) = Registry::open(registry.into(), Some(&path)).unwrap();
        Wreck { state: replayed(&events), segments, store: BTreeMap::new() }
    }

    /// Presents a descriptor under a name; what is in the store then.
    fn present(&mut self, name: &str, fd: OwnedFd) -> Result<Vec<String>, Refusal> {
        let mut gathering = Gathering::new(self.state.clone(), &mut self.store, None);
        gathering.accept(0, vec![name.to_owned()], vec![fd])?;
        Ok(self.store.keys().cloned().collect())
    }

    fn copy(&self, name: &str) -> OwnedFd {
        self.segments[name].try_clone().unwrap()
    }
}

fn problem(refused: Result<Vec<String>, Refusal>) -> String {
    match refused {
        Err(refusal @ Refusal::Presented { .. }) => refusal.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_segment_is_known_by_its_inode_and_taken_from_readers_too() {
    let mut wreck = Wreck::new();
    let names: Vec<String> = missing(&wreck.state, &wreck.store)[&0].iter().cloned().collect();
    assert_eq!(names, ["arena-0", "cursors", "log"]);
    let read_only = memfd::read_only(wreck.segments["log"].as_fd()).unwrap();
    assert_eq!(wreck.present("log", read_only).unwrap(), ["topic-0/log"]);
    // Two present the same.
    assert_eq!(wreck.present("log", wreck.copy("log")).unwrap(), ["topic-0/log"]);
    wreck.present("cursors", wreck.copy("cursors")).unwrap();
    wreck.present("arena-0", wreck.copy("arena-0")).unwrap();
    assert!(missing(&wreck.state, &wreck.store).is_empty());
    let file = std::fs::File::from(wreck.store.remove("topic-0/log").unwrap());
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", 4096).expect("it was opened for writing");
}

#[test]
fn what_is_not_the_topics_own_is_refused() {
    let mut wreck = Wreck::new();
    let forged = memfd::create("forged", 8192).unwrap();
    assert!(problem(wreck.present("log", forged)).contains("inode"));
    assert!(
        problem(wreck.present("log", wreck.copy("cursors"))).contains("inode"),
        "another segment of the same topic"
    );
    // Also after the true one has come.
    wreck.present("log", wreck.copy("log")).unwrap();
    let forged = memfd::create("forged", 8192).unwrap();
    assert!(problem(wreck.present("log", forged)).contains("inode"));
    assert_eq!(wreck.present("no such", memfd::create("forged", 8192).unwrap()).unwrap(), ["topic-0/log"]);
}

#[test]
fn an_inode_is_not_enough() {
    let mut wreck = Wreck::new();
    // Somebody else's file system may have a file of the same number.
    let directory = tempfile::tempdir().unwrap();
    let file = std::fs::File::create_new(directory.path().join("log")).unwrap();
    let inode = file.metadata().unwrap().ino();
    wreck.state.apply(&Event::SegmentsKnown { topic: 0, inodes: vec![("log".to_owned(), inode)] });
    let private = file.try_clone().unwrap();
    private.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    assert!(problem(wreck.present("log", private.into())).contains("0644"));
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    assert!(problem(wreck.present("log", file.into())).contains("memfd"));
    assert!(wreck.store.is_empty());
}

#[test]
fn a_segment_with_another_header_is_no_topic() {
    let mut wreck = Wreck::new();
    let info = wreck.state.topic(0).unwrap().info.clone();
    let log = std::fs::File::from(wreck.copy("log"));
    // Whoever could write it has made it another topic's.
    std::os::unix::fs::FileExt::write_all_at(&log, &99u64.to_le_bytes(), 32).unwrap();
    for name in ["log", "cursors", "arena-0"] {
        wreck.present(name, wreck.copy(name)).unwrap();
    }
    let segments = ["log", "cursors", "arena-0"].map(|name| {
        let fd = wreck.store.remove(&segment_name(0, name)).unwrap();
        (name.to_owned(), fd)
    });
    let adopted = crate::coordinator::memory::TopicMemory::adopt(&info, segments.into());
    assert!(matches!(adopted, Err(Refusal::Corrupt { .. })));
}

/// A connection of a user, as gathering sees it, and its other end.
fn presenter(uid: u32) -> (OwnedFd, Presenter) {
    let (theirs, ours) = socket::pair().unwrap();
    (theirs, Presenter { connection: Connection::new(ours, socket::Peer { pid: 1, uid }), incarnation: None })
}

#[test]
fn who_says_much_leaves_time_for_others() {
    let mut wreck = Wreck::new();
    let mut gathering = Gathering::new(wreck.state.clone(), &mut wreck.store, None);
    let packet = postcard::to_stdvec(&Request::AllPresented { maps_more: false }).unwrap();
    // Several connections of one user that never fall silent, and one of another.
    let (ends, mut presenters): (Vec<OwnedFd>, Vec<Presenter>) = [7, 7, 7, 1000].map(presenter).into_iter().unzip();
    presenters.iter_mut().for_each(|presenter| presenter.incarnation = Some(1));
    let (other, flood) = ends.split_last().unwrap();
    let fill = |end: &OwnedFd| std::iter::from_fn(|| socket::send(end.as_fd(), &packet, &[]).ok()).count();
    let said: usize = flood.iter().map(fill).sum();
    assert!(said > 3 * PACKETS_PER_ROUND && fill(other) > PACKETS_PER_ROUND);
    let mut buffer = vec![0; MAX_PACKET_BYTES];
    gathering.listen_to_all(&mut presenters, &mut buffer);
    assert_eq!(presenters.len(), 4);
    let mut unheard = |uid: u32| -> usize {
        let of_user = presenters.iter_mut().filter(|presenter| presenter.connection.peer.uid == uid);
        let receive = |presenter: &mut Presenter| {
            std::iter::from_fn(|| {
                matches!(presenter.connection.receive(&mut buffer), Received::Request(..)).then_some(())
            })
            .count()
        };
        of_user.map(receive).sum()
    };
    assert_eq!(said - unheard(7), PACKETS_PER_ROUND, "the rest waits for its turn");
    assert!(unheard(1000) > 0);
}

#[test]
fn who_closes_much_leaves_time_for_others() {
    let mut wreck = Wreck::new();
    let who = *wreck.state.participants().keys().next().unwrap();
    let (opening, publisher, tenancy, identity, fenced) = (1, 1, 0, None, false);
    for slot in 0..1 << 14 {
        let opened =
            PublisherEntry { incarnation: who, publisher, opening, tenancy, identity: identity.clone(), fenced };
        wreck.state.apply(&Event::PublisherOpened { topic: 0, slot, opened });
    }
    let mut gathering = Gathering::new(wreck.state.clone(), &mut wreck.store, None);
    // As many as a packet takes, and none of them its own.
    let handles = vec![HandleRef::Publisher { topic: 1, slot: 1 }; MAX_PACKET_BYTES / 4];
    let packet = postcard::to_stdvec(&Request::Close { handles }).unwrap();
    let (theirs, mut closer) = presenter(7);
    closer.incarnation = Some(who);
    socket::send(theirs.as_fd(), &packet, &[]).unwrap();
    let (mut buffer, start) = (vec![0; MAX_PACKET_BYTES], Instant::now());
    assert!(gathering.listen_to(&mut closer, &mut buffer, &mut 1) && gathering.dropped.is_empty());
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

#[test]
fn a_users_newcomers_do_not_keep_participants_out() {
    let mut wreck = Wreck::new();
    let gathering = Gathering::new(wreck.state.clone(), &mut wreck.store, None);
    let strangers: Vec<(OwnedFd, Presenter)> = (0..MAX_NEWCOMERS).map(|_| presenter(7)).collect();
    let (ends, strangers): (Vec<OwnedFd>, Vec<Presenter>) = strangers.into_iter().unzip();
    assert!(!gathering.has_room(&presenter(7).1, &strangers));
    assert!(gathering.has_room(&presenter(1000).1, &strangers));
    let known: Vec<Presenter> = (0..MAX_NEWCOMERS).map(|_| presenter(1000).1).collect();
    assert!(gathering.has_room(&presenter(1000).1, &known), "the participant's own");
    drop(ends);
}

/// A file system may take as long as it likes to say what a file is, or to close it.
#[test]
fn only_memory_is_looked_at() {
    let mut wreck = Wreck::new();
    let mut gathering = Gathering::new(wreck.state.clone(), &mut wreck.store, None);
    let mut buffer = vec![0; MAX_PACKET_BYTES];
    let info = gathering.state.topic(0).unwrap().info.clone();
    let packet = postcard::to_stdvec(&Request::Present { info, names: vec!["log".to_owned()] }).unwrap();
    let file = std::fs::File::open("/proc/self/stat").unwrap();
    let (theirs, mut forger) = presenter(7);
    forger.incarnation = Some(1);
    forger.connection.accept_fds();
    socket::send(theirs.as_fd(), &packet, &[file.as_fd()]).unwrap();
    assert!(matches!(forger.connection.receive(&mut buffer), Received::Foreign(fds) if fds.len() == 1));
    socket::send(theirs.as_fd(), &packet, &[file.as_fd()]).unwrap();
    assert!(!gathering.listen_to(&mut forger, &mut buffer, &mut 1), "it is heard no longer");
    assert!(gathering.store.is_empty());
}
