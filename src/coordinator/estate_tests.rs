//! Coordinators that die between two steps, without processes: an estate is dropped where its coordinator would have
//! been killed, and the next one resumes with what the keeper kept.

use super::*;
use crate::coordinator::link::{Incoming, Message};
use crate::coordinator::protocol::{Identity, StartAt, TopicInfo};
use crate::os::pidfd;
use crate::os::socket::{self, User};
use crate::shm::segment::{Access, Segment};
use crate::shm::topic::LogSegments;
use crate::topic::TopicOptions;

impl Estate {
    /// Lets this process in, as one of user 1000.
    pub(in crate::coordinator) fn admit_us(&mut self) -> u64 {
        let pidfd = pidfd::open(std::process::id()).unwrap();
        self.admit(std::process::id(), User { uid: 1000, gids: vec![1000] }, 1, pidfd).unwrap()
    }
}

/// What a keeper does with what it is told.
struct Keeper {
    store: BTreeMap<String, OwnedFd>,
    socket: OwnedFd,
}

impl Keeper {
    /// A bus with the topic "t", a handle on it, and its keeper.
    fn with_topic() -> (Keeper, Estate, Handle) {
        let bus = 7;
        let registry = Registry::create(None, bus, FIRST_HALF_BYTES, &[Event::Began { bus, stay: true }]).unwrap();
        let registry = registry.as_fd().try_clone_to_owned().unwrap();
        let (socket, _) = socket::pair().unwrap();
        let mut keeper = Keeper { store: BTreeMap::from([(link::REGISTRY.to_owned(), registry)]), socket };
        let mut estate = keeper.restart();
        let us = estate.admit_us();
        let options = TopicOptions { messages: 16, bytes: 4096, ..TopicOptions::default() };
        estate
            .request(
                us,
                &Request::CreateTopic {
                    topic: "t".to_owned(),
                    options,
                    access: None,
                    exist_ok: false,
                    ephemeral: false,
                },
            )
            .unwrap();
        keeper.listen();
        let handle = Handle::on(&keeper, &estate.entry(0).unwrap().info);
        (keeper, estate, handle)
    }

    fn listen(&mut self) {
        loop {
            match link::receive(self.socket.as_fd()).unwrap() {
                Incoming::Message(Message::Store { name }, Some(fd)) => drop(self.store.insert(name, fd)),
                Incoming::Message(Message::Forget { name }, _) => drop(self.store.remove(&name)),
                Incoming::Message(other, _) => panic!("{other:?}"),
                Incoming::Nothing | Incoming::HungUp => return,
            }
        }
    }

    /// The next coordinator, after the last one was dropped.
    fn restart(&mut self) -> Estate {
        self.listen();
        let (ours, theirs) = socket::pair().unwrap();
        self.socket = ours;
        let copies = self.store.iter().map(|(name, fd)| (name.clone(), fd.try_clone().unwrap()));
        let mut copies: BTreeMap<String, OwnedFd> = copies.collect();
        let registry = copies.remove(link::REGISTRY).unwrap();
        let estate = Estate::resume(copies, &BTreeSet::new(), registry, None, Some(Link::new(theirs, None)))
            .map_err(|(error, _)| error)
            .unwrap();
        self.listen();
        estate
    }

    fn kept_of_topics(&self) -> usize {
        self.store.keys().filter(|name| name.starts_with("topic-")).count()
    }
}

/// A topic as one of its handles sees it.
struct Handle(LogSegments);

impl Handle {
    fn on(keeper: &Keeper, info: &TopicInfo) -> Handle {
        let map = |name, promise| {
            let fd = &keeper.store[&segment_name(info.id, name)];
            Segment::attach(fd.as_fd(), &promise, Access::ReadWrite).unwrap()
        };
        Handle(LogSegments { log: map("log", info.log()), cursors: map("cursors", info.cursors()) })
    }

    fn state(&self) -> TopicState {
        self.0.header().state()
    }
}

#[test]
fn a_topic_whose_removal_was_not_logged_lives_on() {
    let (mut keeper, mut estate, handle) = Keeper::with_topic();
    estate.prepare(&Event::TopicRemoved { topic: 0 }).unwrap();
    drop(estate);
    let estate = keeper.restart();
    assert!(estate.state().topic(0).is_some());
    assert_eq!(handle.state(), TopicState::Live);
}

#[test]
fn a_removal_that_was_only_logged_is_finished() {
    let (mut keeper, mut estate, handle) = Keeper::with_topic();
    estate.log(&Event::TopicRemoved { topic: 0 }).unwrap();
    drop(estate);
    assert_eq!(handle.state(), TopicState::Live);
    let estate = keeper.restart();
    assert!(estate.state().topics().is_empty());
    assert_eq!(handle.state(), TopicState::Removed);
    assert_eq!(keeper.kept_of_topics(), 0);
}

#[test]
fn a_removal_of_which_the_keeper_knows_a_part_is_finished() {
    let (mut keeper, mut estate, handle) = Keeper::with_topic();
    estate.carry_out(Event::TopicRemoved { topic: 0 }).unwrap();
    assert_eq!(handle.state(), TopicState::Removed);
    drop(estate);
    let kept = keeper.store["topic-0/log"].try_clone().unwrap();
    keeper.listen();
    assert_eq!(keeper.kept_of_topics(), 0);
    keeper.store.insert("topic-0/log".to_owned(), kept);
    let estate = keeper.restart();
    assert!(estate.state().topics().is_empty());
    assert_eq!(keeper.kept_of_topics(), 0);
}

#[test]
fn a_topic_that_is_lost_leaves_nothing_with_the_keeper() {
    let (mut keeper, estate, _) = Keeper::with_topic();
    drop(estate);
    keeper.store.remove("topic-0/log");
    assert!(keeper.restart().state().topics().is_empty());
    assert_eq!(keeper.kept_of_topics(), 0);
}

#[test]
fn a_fencing_that_was_only_logged_is_finished_and_done_once() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let us = *estate.state().participants().keys().next().unwrap();
    let identity = Some(Identity::Named("n".to_owned()));
    estate
        .request(us, &Request::OpenPublisher { topic: "t".to_owned(), schema: None, create: None, identity })
        .unwrap();
    estate.log(&Event::Fenced { topic: 0, slot: 0 }).unwrap();
    drop(estate);
    for _ in 0..2 {
        let estate = keeper.restart();
        let entry = estate.entry(0).unwrap();
        assert!(entry.unsettled().is_empty());
        assert_eq!(entry.publishers[&0].identity, None);
        assert_eq!(estate.memory(0).unwrap().range().unwrap(), (0, 1), "one fence, one hole");
    }
}

#[test]
fn an_end_that_was_only_logged_is_finished() {
    let (mut keeper, mut estate, handle) = Keeper::with_topic();
    estate.log(&Event::Ending).unwrap();
    drop(estate);
    assert_eq!(handle.state(), TopicState::Live);
    for _ in 0..2 {
        assert!(keeper.restart().state().ending);
        assert_eq!(handle.state(), TopicState::Stopped);
    }
}

#[test]
fn an_end_is_remembered() {
    let (mut keeper, mut estate, handle) = Keeper::with_topic();
    estate.stop();
    assert_eq!(handle.state(), TopicState::Stopped);
    assert!(estate.state().snapshot().contains(&Event::Ending));
    drop(estate);
    assert!(keeper.restart().state().ending);
}

/// Whoever asks again after a coordinator's death is told what came of it, not that it has been done.
#[test]
fn what_is_to_be_done_once_is_answered_as_it_was() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let us = *estate.state().participants().keys().next().unwrap();
    let options = TopicOptions { messages: 16, bytes: 4096, ..TopicOptions::default() };
    let create =
        Request::CreateTopic { topic: "new".to_owned(), options, access: None, exist_ok: false, ephemeral: true };
    let remove = Request::RemoveTopic { topic: "new".to_owned(), force: false };
    let created = |answer| matches!(answer, Ok(Some((Answer::Created { existed: false }, _))));
    for (request, number) in [(&create, 1), (&remove, 2), (&create, 3)] {
        let first = estate.request_numbered(us, request, number).unwrap().unwrap().0;
        keeper.listen();
        drop(estate);
        estate = keeper.restart();
        let again = estate.request_numbered(us, request, number).unwrap().unwrap().0;
        assert_eq!(postcard::to_stdvec(&again), postcard::to_stdvec(&first));
        let snapshot = estate.state().snapshot();
        estate.registry.compact(&snapshot).unwrap();
    }
    assert!(created(estate.request_numbered(us, &create, 3)));
    assert!(matches!(estate.request_numbered(us, &create, 4), Err(Refusal::AlreadyExists { .. })));
    assert!(matches!(estate.request(us, &create), Err(Refusal::AlreadyExists { .. })));
    assert!(matches!(estate.request_numbered(us, &Request::Report, 5), Err(Refusal::Protocol { .. })));
}

/// Nobody has been let in of whom the registry does not say who he is: he comes again.
#[test]
fn who_was_not_let_in_is_forgotten() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let pidfd = pidfd::open(std::process::id()).unwrap();
    estate.link.as_mut().unwrap().store(&participant_name(2), pidfd.as_fd()).unwrap();
    estate.carry_out(Event::Joined { incarnation: 2, pid: std::process::id(), uid: 1000, gids: Vec::new() }).unwrap();
    assert_eq!(estate.state().participants().len(), 2);
    keeper.listen();
    drop(estate);
    let estate = keeper.restart();
    assert_eq!(estate.state().participants().len(), 1);
}

/// A wildcard subscription of `us`, with what it has.
fn open_wildcard(keeper: &mut Keeper, estate: &mut Estate) -> u64 {
    let us = *estate.state().participants().keys().next().unwrap();
    let request =
        Request::OpenWildcard { pattern: ">".to_owned(), schema: None, start: StartAt::Latest, droppable: false };
    estate.request(us, &request).unwrap();
    keeper.listen();
    us
}

/// A topic whose publishers have garbled it keeps nobody from the others.
#[test]
fn a_wildcard_misses_what_cannot_be_joined() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let us = *estate.state().participants().keys().next().unwrap();
    let options = TopicOptions { messages: 16, bytes: 4096, ..TopicOptions::default() };
    let request =
        Request::CreateTopic { topic: "sound".to_owned(), options, access: None, exist_ok: false, ephemeral: false };
    estate.request(us, &request).unwrap();
    keeper.listen();
    // No place leads to the tail any more: checkpoints, and the coordinator's own (ARCHITECTURE.md §3.2).
    let log = std::fs::File::from(keeper.store[&segment_name(0, "log")].try_clone().unwrap());
    for (at, len) in [(4096 + 512, 64 * 64), (4096 + 16_896, 64)] {
        std::os::unix::fs::FileExt::write_all_at(&log, &vec![0xff; len], at).unwrap();
    }
    assert_eq!(open_wildcard(&mut keeper, &mut estate), us);
    let entry = &estate.state().wildcards()[&1];
    let missed: Vec<u64> = entry.missed.iter().map(|missed| missed.topic).collect();
    assert_eq!(missed, [0]);
    assert_eq!(estate.state().cursors_of_wildcard(1).len(), 1);
    let news: Vec<Answer> =
        estate.take_news().into_iter().map(|news| estate.wildcard_topic(news).unwrap().unwrap().0).collect();
    let of = |answer: &Answer| match answer {
        Answer::WildcardMissed { topic, why, .. } => format!("{topic}: {why}"),
        Answer::WildcardTopic { info, .. } => info.name.clone(),
        other => panic!("{other:?}"),
    };
    let news: Vec<String> = news.iter().map(of).collect();
    assert!(news[0].starts_with("t: ") && news[0].contains("corrupt") && news[1] == "sound", "{news:?}");
    // A successor tells whoever has not heard of it.
    drop(estate);
    let estate = keeper.restart();
    let (news, wildcards) = estate.news_for(us, &[HandleRef::Wildcard { wildcard: 1 }]);
    assert_eq!((news.len(), wildcards.len()), (2, 1));
}

/// Whoever asks for the topic again finds it there, and publishes: the cursor must be in force before that.
#[test]
fn a_creation_that_was_cut_short_is_finished_for_its_wildcards() {
    for done in 1..=2 {
        let (mut keeper, mut estate, _) = Keeper::with_topic();
        let us = open_wildcard(&mut keeper, &mut estate);
        let options = TopicOptions { messages: 16, bytes: 4096, ..TopicOptions::default() };
        let request =
            Request::CreateTopic { topic: "new".to_owned(), options, access: None, exist_ok: false, ephemeral: false };
        let plan = estate.state.request(&estate.limits, FOOTPRINT, us, &request).unwrap();
        assert_eq!(plan.events.len(), 2);
        estate.carry_out(plan.events[0].clone()).unwrap();
        if done == 2 {
            estate.log(&plan.events[1]).unwrap();
        }
        drop(estate);
        let estate = keeper.restart();
        assert_eq!(estate.state().topic(1).unwrap().subscribers.len(), 1);
        assert!(estate.memory(1).unwrap().is_in_force(0, us), "after {done} events");
        let (news, wildcards) = estate.news_for(us, &[HandleRef::Wildcard { wildcard: 1 }]);
        assert_eq!((news.len(), wildcards), (2, vec![(1, 2)]), "the owner is told of both topics");
    }
}

#[test]
fn a_wildcard_leaves_nothing_with_the_keeper() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let us = open_wildcard(&mut keeper, &mut estate);
    let notices = |keeper: &Keeper| keeper.store.keys().filter(|name| name.starts_with("wildcard-")).count();
    assert_eq!(notices(&keeper), 1);
    drop(estate);
    let mut estate = keeper.restart();
    assert_eq!(notices(&keeper), 1);
    estate.request(us, &Request::Close { handles: vec![HandleRef::Wildcard { wildcard: 1 }] }).unwrap();
    keeper.listen();
    assert_eq!(notices(&keeper), 0);
    open_wildcard(&mut keeper, &mut estate);
    estate.release_participant(us).unwrap();
    keeper.listen();
    assert_eq!(notices(&keeper), 0);
    assert!(!estate.memory(0).unwrap().is_in_force(0, us));
}

#[path = "estate/group_tests.rs"]
mod groups;

#[path = "estate/round_tests.rs"]
mod rounds;

/// A keeper that is stopped, and whose socket is full.
fn stopped_keeper() -> (OwnedFd, Link) {
    let (keeper, ours) = socket::pair().unwrap();
    while socket::send(ours.as_fd(), &[0; 512], &[]).is_ok() {}
    (keeper, Link::new(ours, None))
}

#[test]
fn the_registry_that_has_the_name_is_the_one_that_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bus.registry");
    let mut estate = Estate::found(7, Some(&path)).unwrap();
    let (_keeper, link) = stopped_keeper();
    estate.replace_link(Some(link));
    // It outgrows its file while the keeper cannot be told; what is small still fits in the former one.
    let large = |incarnation| Event::Joined { incarnation, pid: 1, uid: 2, gids: vec![1 << 20; 256] };
    let _ = (1..200).try_for_each(|incarnation| estate.carry_out(large(incarnation)));
    estate.carry_out(Event::Left { incarnation: 1 }).unwrap();
    let named = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let (_, events) = Registry::open(named.into(), Some(&path)).unwrap();
    let mut found = State::default();
    events.iter().for_each(|event| found.apply(event));
    assert_eq!(found.participants().len(), estate.state().participants().len());
    assert!(found == *estate.state(), "whoever finds the registry by its name is told something else");
}
