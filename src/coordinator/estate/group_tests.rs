//! Groups across coordinators that die between two steps.

use super::*;
use crate::coordinator::memory::ledger_name;
use crate::coordinator::protocol::{GroupInfo, GroupStatus};
use crate::group::GroupOptions;
use crate::ring::ledger::{Ledger, State as Word};
use crate::shm::topic;

fn us() -> u64 {
    1
}

fn ask(estate: &mut Estate, request: Request) -> Result<Answer, Refusal> {
    Ok(estate.request(us(), &request)?.unwrap().0)
}

fn create(group: &str, options: GroupOptions, start: StartAt) -> Request {
    let (topic, group) = ("t".to_owned(), group.to_owned());
    Request::CreateGroup { topic, group, options, start, exist_ok: false }
}

fn open(group: &str) -> Request {
    let (topic, group) = ("t".to_owned(), group.to_owned());
    Request::OpenConsumer { topic, group, schema: None, create: Some((GroupOptions::default(), StartAt::Oldest)) }
}

fn remove(group: &str, force: bool) -> Request {
    Request::RemoveGroup { topic: "t".to_owned(), group: group.to_owned(), force }
}

fn rewind(group: &str, start: StartAt, force: bool) -> Request {
    Request::RewindGroup { topic: "t".to_owned(), group: group.to_owned(), start, force }
}

fn close(group: u32, consumer: u32) -> Request {
    Request::Close { handles: vec![HandleRef::Consumer { topic: 0, group, consumer }] }
}

/// A consumer as far as its memory goes.
struct Consumer {
    group: GroupInfo,
    number: u8,
    ledger: Ledger,
}

impl Consumer {
    fn open(estate: &mut Estate, keeper: &mut Keeper, name: &str) -> Consumer {
        let Answer::ConsumerOpened { info, group, consumer, position, sequence, segments } =
            ask(estate, open(name)).unwrap()
        else {
            panic!("no consumer")
        };
        assert_eq!((position, sequence), (0, 0), "nothing was published");
        assert_eq!(segments[..3], [SegmentRef::Log, SegmentRef::Cursors, SegmentRef::Ledger]);
        keeper.listen();
        let fd = &keeper.store[&segment_name(0, &ledger_name(group.id))];
        let segment = Segment::attach(fd.as_fd(), &info.ledger(&group), Access::ReadWrite).unwrap();
        let ledger = topic::ledger(&segment, &info, &group);
        Consumer { group, number: consumer as u8, ledger }
    }

    /// Leases the message, although nobody published it.
    fn take(&self, sequence: u64, due: u64) {
        self.ledger.raise_hint(sequence + 1);
        self.ledger.take(self.ledger.look(sequence), self.number, due).unwrap();
    }

    fn sees(&self, sequence: u64) -> Word {
        self.ledger.look(sequence).state
    }
}

fn status(estate: &mut Estate) -> Vec<GroupStatus> {
    match ask(estate, Request::Status { topic: Some("t".to_owned()), after: None }).unwrap() {
        Answer::Status { topics, .. } => topics.into_iter().next().unwrap().groups,
        other => panic!("{other:?}"),
    }
}

fn ledgers(keeper: &Keeper) -> Vec<&str> {
    keeper.store.keys().filter_map(|name| name.strip_prefix("topic-0/ledger-")).collect()
}

/// Which cursors are in force, as publishers see it.
fn in_force(handle: &Handle, estate: &Estate) -> Vec<bool> {
    let lines = handle.0.cursor_lines(&estate.entry(0).unwrap().info);
    lines.iter().take(4).map(|line| line.place().is_some()).collect()
}

#[test]
fn a_consumer_opens_its_group_and_what_it_holds_returns_when_it_closes() {
    let (mut keeper, mut estate, handle) = Keeper::with_topic();
    let consumer = Consumer::open(&mut estate, &mut keeper, "g");
    assert_eq!((consumer.group.id, consumer.group.cursor, consumer.number), (0, 0, 0));
    assert_eq!(in_force(&handle, &estate), [true, false, false, false]);
    consumer.take(0, u64::MAX);
    let before = status(&mut estate).remove(0);
    assert_eq!((before.name.as_str(), before.in_flight, before.floor), ("g", 1, 0));
    assert_eq!(before.oldest_lease.unwrap().pid, std::process::id());
    assert_eq!(before.consumers[0].in_flight, 1);
    ask(&mut estate, close(0, 0)).unwrap();
    assert_eq!(consumer.sees(0), Word::Returned);
    let after = status(&mut estate).remove(0);
    assert_eq!((after.in_flight, after.returned, after.consumers.len()), (0, 1, 0));
    assert_eq!(in_force(&handle, &estate), [true, false, false, false], "the group stays");
}
