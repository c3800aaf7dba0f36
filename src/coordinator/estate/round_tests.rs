//! What is done in parts: others have their turn in between, and whatever happens then is allowed for.

use std::os::fd::AsRawFd;

use super::*;
use crate::coordinator::state::Aside;

const MIB: u64 = 1 << 20;

/// Asks for a topic of so many bytes.
fn create(name: &str, bytes: u64) -> Request {
    let options = TopicOptions { messages: 16, bytes, ..TopicOptions::default() };
    Request::CreateTopic { topic: name.to_owned(), options, access: None, exist_ok: false, ephemeral: false }
}

fn us(estate: &Estate) -> u64 {
    *estate.state().participants().keys().next().unwrap()
}

/// One round of a request.
fn step(
    estate: &mut Estate,
    request: &Request,
    progress: &mut Progress,
    others: Others<'_>,
) -> Result<Outcome, Refusal> {
    estate.begin_round();
    let us = us(estate);
    estate.request_once(us, request, 0, progress, others)
}

/// In how many rounds a request is granted.
fn rounds(estate: &mut Estate, request: &Request, progress: &mut Progress) -> usize {
    let is_granted = |estate: &mut Estate, progress: &mut Progress| {
        matches!(step(estate, request, progress, &|_| {}).unwrap(), Outcome::Granted(_))
    };
    (1..1000).find(|_| is_granted(estate, progress)).unwrap()
}

/// Memfds of this process with such a name.
fn memfds(name: &str) -> usize {
    let name = format!("/memfd:shmbus:{name}:");
    let entries = std::fs::read_dir("/proc/self/fd").unwrap();
    let links = entries.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    links.filter(|link| link.to_string_lossy().starts_with(&name)).count()
}

#[test]
fn much_memory_is_reserved_piece_by_piece() {
    let (_keeper, mut estate, _) = Keeper::with_topic();
    let (mut progress, request) = (Progress::default(), create("large", 64 * MIB));
    assert!(matches!(step(&mut estate, &request, &mut progress, &|_| {}), Ok(Outcome::PutOff)));
    // Nobody knows of it, and its user cannot have it twice.
    assert_eq!(estate.state().topics().len(), 1);
    let aside = progress.reservation.aside(1000);
    assert!(aside.bytes > 64 * MIB && aside.segments == 3, "{aside:?}");
    assert_eq!(progress.reservation.aside(0), Aside::default());
    estate.limits.budget_bytes = 100 * MIB;
    let others = |look: &mut dyn FnMut(&Progress)| look(&progress);
    let second = step(&mut estate, &create("second", 64 * MIB), &mut Progress::default(), &others);
    assert!(matches!(second, Err(Refusal::Budget { .. })));
    estate.limits.user_segments = 8;
    let second = step(&mut estate, &create("second", 4096), &mut Progress::default(), &others);
    assert!(matches!(second, Err(Refusal::Limit { .. })), "3 of topic t, 3 set aside");
    assert!(rounds(&mut estate, &request, &mut progress) > 20);
    let fd = estate.memory(1).unwrap().arena_fd(0).unwrap();
    assert!(crate::os::memfd::held_bytes(fd.as_fd()) >= 64 * MIB, "it is reserved in full");
    assert!(crate::os::memfd::check_sealed(fd.as_fd()).is_ok(), "{}", fd.as_raw_fd());
    assert_eq!(progress.reservation.aside(1000), Aside::default());
}

/// It is decided anew in each round; what was reserved in vain is given up.
#[test]
fn what_changed_while_memory_was_reserved_counts() {
    let (_keeper, mut estate, _) = Keeper::with_topic();
    let (mut progress, request) = (Progress::default(), create("contested", 16 * MIB));
    assert!(matches!(step(&mut estate, &request, &mut progress, &|_| {}), Ok(Outcome::PutOff)));
    let us = us(&estate);
    estate.request(us, &create("contested", MIB)).unwrap();
    assert_eq!(memfds("contested"), 6);
    let refused = step(&mut estate, &request, &mut progress, &|_| {}).err();
    assert!(matches!(refused, Some(Refusal::AlreadyExists { .. })), "{refused:?}");
    drop(progress);
    let deadline = Instant::now() + std::time::Duration::from_secs(10);
    while memfds("contested") > 3 && Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert_eq!(memfds("contested"), 3);
}

/// Programs that start together ask for the same topic: it is reserved once.
#[test]
fn who_asks_for_the_same_waits_for_it() {
    let (_keeper, mut estate, _) = Keeper::with_topic();
    estate.limits.budget_bytes = 100 * MIB;
    let mut request = create("same", 64 * MIB);
    let Request::CreateTopic { exist_ok, .. } = &mut request else { panic!() };
    *exist_ok = true;
    let (mut first, mut second) = (Progress::default(), Progress::default());
    assert!(matches!(step(&mut estate, &request, &mut first, &|_| {}), Ok(Outcome::PutOff)));
    let others = |look: &mut dyn FnMut(&Progress)| look(&first);
    assert!(matches!(step(&mut estate, &request, &mut second, &others), Ok(Outcome::PutOff)));
    assert_eq!((memfds("same"), second.reservation.aside(1000)), (3, Aside::default()));
    rounds(&mut estate, &request, &mut first);
    let found = step(&mut estate, &request, &mut second, &|_| {}).unwrap();
    assert!(matches!(found, Outcome::Granted((Answer::Created { existed: true }, _))));
}

/// A ledger and an arena as well; and under a number, once, whichever coordinator it is.
#[test]
fn whatever_is_large_is_reserved_in_parts() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let us = us(&estate);
    estate.request(us, &create("large", 16 * MIB)).unwrap();
    let open =
        |topic: &str| Request::OpenPublisher { topic: topic.to_owned(), schema: None, create: None, identity: None };
    assert_eq!(rounds(&mut estate, &open("large"), &mut Progress::default()), 1, "the first arena is there");
    assert!(rounds(&mut estate, &open("large"), &mut Progress::default()) > 5);
    let options = crate::group::GroupOptions { window: 1 << 20, ..Default::default() };
    let (topic, group) = ("large".to_owned(), "g".to_owned());
    let group = Request::CreateGroup { topic, group, options, start: StartAt::Oldest, exist_ok: false };
    estate.begin_round();
    let begun = estate.request_once(us, &group, 1, &mut Progress::default(), &|_| {});
    assert!(matches!(begun, Ok(Outcome::PutOff)));
    drop(estate);
    let mut estate = keeper.restart();
    for _ in 0..2 {
        let (answer, _) = estate.request_numbered(us, &group, 1).unwrap().unwrap();
        assert!(matches!(answer, Answer::Created { existed: false }));
        keeper.listen();
    }
    assert_eq!(estate.entry(1).unwrap().groups.len(), 1);
}

/// The slots of a channel are formatted as they are reserved.
#[test]
fn a_long_channel_is_made_in_parts() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let mut request = create("channel", 4096);
    let Request::CreateTopic { options, .. } = &mut request else { panic!() };
    (options.mode, options.messages) = (crate::topic::Mode::Channel, 1 << 18);
    assert!(rounds(&mut estate, &request, &mut Progress::default()) > 2);
    let info = estate.entry(1).unwrap().info.clone();
    keeper.listen();
    let fd = &keeper.store[&segment_name(1, "channel")];
    let segment = Segment::attach(fd.as_fd(), &info.channel(), Access::ReadWrite).unwrap();
    let made = bytes_of(fd);
    crate::shm::topic::format_channel(&segment, &info.geometry, 0..info.geometry.slots);
    assert!(made == bytes_of(fd), "every slot was formatted already");
}

fn bytes_of(fd: &OwnedFd) -> Vec<u8> {
    let file = std::fs::File::from(fd.try_clone().unwrap());
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
    bytes
}

/// What comes up while a wildcard subscription is opened does not take its owner beyond his limits.
#[test]
fn a_wildcard_that_is_opened_in_parts_keeps_its_owners_limits() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let us = us(&estate);
    for number in 0..300 {
        estate.request(us, &create(&format!("t-{number}"), 4096)).unwrap();
        keeper.listen();
    }
    estate.limits.handles = 310;
    let open =
        Request::OpenWildcard { pattern: ">".to_owned(), schema: None, start: StartAt::Latest, droppable: false };
    let mut progress = Progress::default();
    assert!(matches!(step(&mut estate, &open, &mut progress, &|_| {}), Ok(Outcome::PutOff)));
    for number in 0..100 {
        estate.request(us, &create(&format!("new-{number}"), 4096)).unwrap();
        keeper.listen();
    }
    rounds(&mut estate, &open, &mut progress);
    assert_eq!(estate.state().handles_of(us).len(), 310);
    assert!(!estate.state().wildcards()[&1].missed.is_empty(), "and is told of the others");
}

/// Whoever holds much is released in parts; its topics go first, and it goes last.
#[test]
fn who_holds_much_is_released_in_parts() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let us = us(&estate);
    for number in 0..100 {
        let mut request = create(&format!("own-{number}"), 4096);
        let Request::CreateTopic { ephemeral, .. } = &mut request else { panic!() };
        *ephemeral = true;
        estate.request(us, &request).unwrap();
        keeper.listen();
    }
    for name in ["a", "b"] {
        estate.request(us, &create(name, 4096)).unwrap();
        for _ in 0..200 {
            let open = Request::OpenSubscriber {
                topic: name.to_owned(),
                schema: None,
                start: StartAt::Oldest,
                droppable: false,
            };
            // As many as it has room for.
            let _ = estate.request(us, &open);
        }
    }
    let held = estate.state().handles_of(us).len();
    assert!(held > 256, "{held}");
    let (mut parts, mut left) = (0, Vec::new());
    loop {
        estate.begin_round();
        if !estate.release_in_part(us).unwrap() {
            break;
        }
        keeper.listen();
        parts += 1;
        left.push((estate.state().topics_of(us).len(), estate.state().handles_of(us).len()));
    }
    assert!(parts >= 9, "{parts}");
    assert!(left.windows(2).all(|pair| pair[0] > pair[1]), "{left:?}");
    assert_eq!(left[0].1, held, "topics first: {left:?}");
    estate.release_participant(us).unwrap();
    assert!(estate.state().participants().is_empty());
    assert_eq!(estate.state().topics().len(), 3);
    assert!((0..100).all(|cursor| !estate.memory(101).unwrap().is_in_force(cursor, us)));
}

/// What is created or removed while a wildcard subscription is opened is allowed for: it has each topic once.
#[test]
fn a_wildcard_is_opened_in_parts() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let us = us(&estate);
    let topic = |estate: &mut Estate, keeper: &mut Keeper, name: String| {
        estate.request(us, &create(&name, 4096)).unwrap();
        keeper.listen();
    };
    (0..300).for_each(|number| topic(&mut estate, &mut keeper, format!("old-{number}")));
    let open =
        Request::OpenWildcard { pattern: ">".to_owned(), schema: None, start: StartAt::Latest, droppable: false };
    let mut progress = Progress::default();
    assert!(matches!(step(&mut estate, &open, &mut progress, &|_| {}), Ok(Outcome::PutOff)));
    topic(&mut estate, &mut keeper, "new".to_owned());
    let remove = |name: &str| Request::RemoveTopic { topic: name.to_owned(), force: true };
    ["old-0", "old-299"].into_iter().for_each(|name| drop(estate.request(us, &remove(name)).unwrap()));
    keeper.listen();
    assert!(rounds(&mut estate, &open, &mut progress) >= 2);
    keeper.listen();
    let has = |estate: &Estate| {
        let topics = estate.state().topics().values();
        topics.map(|topic| topic.subscribers.values().filter(|s| s.wildcard == Some(1)).count()).collect::<Vec<_>>()
    };
    assert_eq!(has(&estate), vec![1; 300]);
    assert!(estate.state().topics().keys().all(|topic| estate.memory(*topic).unwrap().is_in_force(0, us)));
    assert_eq!(estate.take_news().len(), 301, "with the one that was removed");
}

/// Its owner was never answered: it comes back without it.
#[test]
fn a_wildcard_that_was_opened_in_part_goes_with_its_coordinator() {
    let (mut keeper, mut estate, _) = Keeper::with_topic();
    let us = us(&estate);
    for number in 0..300 {
        estate.request(us, &create(&format!("t-{number}"), 4096)).unwrap();
        keeper.listen();
    }
    let open =
        Request::OpenWildcard { pattern: ">".to_owned(), schema: None, start: StartAt::Latest, droppable: false };
    let begun = step(&mut estate, &open, &mut Progress::default(), &|_| {});
    assert!(matches!(begun, Ok(Outcome::PutOff)));
    drop(estate);
    let mut estate = keeper.restart();
    let back = estate.state().rejoin(us, &[]).unwrap();
    estate.carry_out_all(back.events).unwrap();
    assert!(estate.state().wildcards().is_empty() && estate.state().handles_of(us).is_empty());
    assert!(estate.state().topics().keys().all(|topic| !estate.memory(*topic).unwrap().is_in_force(0, us)));
}
