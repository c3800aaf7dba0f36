//! Decisions about groups.

use super::*;
use crate::group::{GroupOptions, Guarantee};

fn new_group(topic: &str, group: &str, options: GroupOptions) -> Request {
    let (topic, group) = (topic.to_owned(), group.to_owned());
    Request::CreateGroup { topic, group, options, start: StartAt::Oldest, exist_ok: true }
}

fn plain(topic: &str, group: &str) -> Request {
    new_group(topic, group, GroupOptions::default())
}

fn consumer(topic: &str, group: &str) -> Request {
    let (topic, group) = (topic.to_owned(), group.to_owned());
    Request::OpenConsumer { topic, group, schema: None, create: None }
}

pub(super) fn remove(topic: &str, group: &str, force: bool) -> Request {
    Request::RemoveGroup { topic: topic.to_owned(), group: group.to_owned(), force }
}

pub(super) fn rewind(topic: &str, group: &str, force: bool) -> Request {
    let (topic, group) = (topic.to_owned(), group.to_owned());
    Request::RewindGroup { topic, group, start: StartAt::Oldest, force }
}

pub(super) fn consumer_of_new(topic: &str, group: &str) -> Request {
    let (topic, group) = (topic.to_owned(), group.to_owned());
    let create = Some((GroupOptions::default(), StartAt::Latest));
    Request::OpenConsumer { topic, group, schema: None, create }
}

/// Opens a publisher as the first of the participant's consumers.
pub(super) fn outputs(state: &State, who: u64, topic: &str) -> Result<Plan, Refusal> {
    let identity = state.handles_of(who).first().and_then(|handle| match *handle {
        HandleRef::Consumer { topic, group, consumer } => Some(Identity::Origin { topic, group, consumer }),
        _ => None,
    });
    let (topic, create) = (topic.to_owned(), Some(TopicOptions::default()));
    ask_only(state, who, Request::OpenPublisher { topic, schema: None, create, identity })
}

fn opened(plan: Result<Plan, Refusal>) -> (u32, u32) {
    match plan.unwrap().reply {
        Reply::Consumer { group, consumer, .. } => (group, consumer),
        other => panic!("{other:?}"),
    }
}

/// A state with the topic "t" and one participant.
fn with_topic() -> (State, u64) {
    let mut state = state();
    let a = join(&mut state);
    ask(&mut state, a, create("t", TopicOptions::default())).unwrap();
    (state, a)
}

fn problem_of(plan: Result<Plan, Refusal>) -> String {
    match plan {
        Err(Refusal::GroupOptions { problem, .. }) => problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_group_takes_a_cursor_and_memory_until_it_is_removed() {
    let (mut state, a) = with_topic();
    ask(&mut state, a, plain("t", "g")).unwrap();
    assert_eq!(state.reserved_bytes(), 1_010);
    assert_eq!(slot(ask(&mut state, a, subscriber("t"))), 1, "cursor 0 is the group's");
    ask(&mut state, a, remove("t", "g", false)).unwrap();
    assert_eq!(state.reserved_bytes(), 1_000);
    assert_eq!(slot(ask(&mut state, a, subscriber("t"))), 0);
    let again = ask(&mut state, a, plain("t", "g")).unwrap();
    assert!(matches!(&again.events[..], [Event::GroupCreated { info, .. }] if info.id == 1), "numbers are not reused");
}

#[test]
fn consumers_get_the_lowest_free_number() {
    let (mut state, a) = with_topic();
    let b = join(&mut state);
    assert_eq!(opened(ask(&mut state, a, consumer_of_new("t", "g"))), (0, 0));
    assert_eq!(opened(ask(&mut state, b, consumer_of_new("t", "g"))), (0, 1));
    assert_eq!(state.readers_of(0), [a, b].into());
    state.apply(&Event::Left { incarnation: a });
    assert_eq!(opened(ask(&mut state, b, consumer("t", "g"))), (0, 0));
    assert_eq!(state.topic(0).unwrap().groups.len(), 1);
}

#[test]
fn a_rewound_group_keeps_its_name_and_the_old_one_waits_for_its_consumers() {
    let (mut state, a) = with_topic();
    ask(&mut state, a, plain("t", "g")).unwrap();
    ask(&mut state, a, consumer("t", "g")).unwrap();
    let refused = ask(&mut state, a, rewind("t", "g", false));
    assert!(matches!(&refused, Err(Refusal::GroupInUse { consumers: 1, pids, .. }) if *pids == [4000]));
    ask(&mut state, a, rewind("t", "g", true)).unwrap();
    let cursors = |state: &State| -> Vec<u32> {
        state.topic(0).unwrap().groups.values().map(|group| group.info.cursor).collect()
    };
    assert_eq!(cursors(&state), [0, 1]);
    assert_eq!(opened(ask(&mut state, a, consumer("t", "g"))), (1, 0));
    assert_eq!(slot(ask(&mut state, a, subscriber("t"))), 2, "the retired group's cursor is not free");
    assert_eq!(state.reserved_bytes(), 1_020);
    state.apply(&Event::Closed { handle: HandleRef::Consumer { topic: 0, group: 0, consumer: 0 } });
    assert_eq!(cursors(&state), [1]);
    assert_eq!(state.reserved_bytes(), 1_010);
}

#[test]
fn what_cannot_be_a_group_is_refused_with_the_reason() {
    let (mut state, a) = with_topic();
    assert!(matches!(ask(&mut state, a, plain("none", "g")), Err(Refusal::UnknownTopic { .. })));
    assert!(matches!(ask(&mut state, a, plain("t", "g/h")), Err(Refusal::GroupName { .. })));
    for request in [consumer("t", "g"), remove("t", "g", true), rewind("t", "g", true)] {
        assert!(matches!(ask(&mut state, a, request), Err(Refusal::UnknownGroup { .. })));
    }
    let zero = GroupOptions { lease_ms: 0, ..GroupOptions::default() };
    assert!(problem_of(ask(&mut state, a, new_group("t", "g", zero))).contains("lease is 0 ms"));
    ask(&mut state, a, create("c", mode(Mode::Channel))).unwrap();
    assert!(problem_of(ask(&mut state, a, plain("c", "g"))).contains("channel"));
    let overwrite = TopicOptions { full: Full::Overwrite, ..TopicOptions::default() };
    ask(&mut state, a, create("o", overwrite)).unwrap();
    assert!(problem_of(ask(&mut state, a, plain("o", "g"))).contains("overwrites"));
    let long = "g".repeat(199);
    assert!(problem_of(ask(&mut state, a, plain("t", &long))).contains("dead-letter topic cannot be"));
}

#[test]
fn dead_letters_do_not_go_round_in_circles() {
    let (mut state, a) = with_topic();
    let enveloped = TopicOptions { envelope: true, ..TopicOptions::default() };
    let to = |name: &str| GroupOptions { dead_letter: Some(name.to_owned()), ..GroupOptions::default() };
    ask(&mut state, a, create("u", enveloped.clone())).unwrap();
    assert!(problem_of(ask(&mut state, a, new_group("t", "g", to("t")))).contains("back"));
    ask(&mut state, a, new_group("t", "g", to("u"))).unwrap();
    assert!(problem_of(ask(&mut state, a, new_group("u", "h", to("t")))).contains("\"t\""));
    ask(&mut state, a, new_group("u", "h", to("v"))).unwrap();
    ask(&mut state, a, create("v", enveloped.clone())).unwrap();
    assert!(problem_of(ask(&mut state, a, new_group("v", "i", to("t")))).contains("back"));
    ask(&mut state, a, remove("t", "g", false)).unwrap();
    assert!(problem_of(ask(&mut state, a, new_group("v", "i", to("t")))).contains("no envelopes"));
    ask(&mut state, a, new_group("v", "i", to("w"))).unwrap();
}

#[test]
fn creating_a_group_again_compares_every_option() {
    let (mut state, a) = with_topic();
    let options = GroupOptions { max_attempts: 3, ..GroupOptions::default() };
    ask(&mut state, a, new_group("t", "g", options.clone())).unwrap();
    let again = ask(&mut state, a, new_group("t", "g", options.clone())).unwrap();
    assert_eq!(again.reply, Reply::Created { existed: true });
    let others = [
        GroupOptions { guarantee: Guarantee::EffectivelyOnce, ..options.clone() },
        GroupOptions { lease_ms: 5, ..options.clone() },
        GroupOptions { max_in_flight: 5, ..options.clone() },
        GroupOptions { max_attempts: 5, ..options.clone() },
        GroupOptions { back_off_ms: vec![5], ..options.clone() },
        GroupOptions { dead_letter: Some("d".into()), ..options.clone() },
        GroupOptions { exclusive: true, ..options.clone() },
        GroupOptions { window: 64, ..options },
    ];
    for other in others {
        let refused = ask(&mut state, a, new_group("t", "g", other));
        let Err(Refusal::GroupExists { difference, .. }) = refused else { panic!("{refused:?}") };
        assert!(difference.contains("asked for"), "{difference}");
    }
    let (topic, group, start) = ("t".to_owned(), "g".to_owned(), StartAt::Oldest);
    let strict = Request::CreateGroup { topic, group, options: GroupOptions::default(), start, exist_ok: false };
    assert!(matches!(ask(&mut state, a, strict), Err(Refusal::GroupAlreadyExists { .. })));
}

#[test]
fn groups_and_consumers_are_limited() {
    let (mut state, a) = with_topic();
    for n in 0..64 {
        ask(&mut state, a, plain("t", &format!("g{n}"))).unwrap();
    }
    assert!(matches!(ask(&mut state, a, plain("t", "more")), Err(Refusal::Limit { limit: 64, .. })));
    let (incarnation, topic, group) = (a, 0, 0);
    (0..255).for_each(|consumer| state.apply(&Event::ConsumerOpened { topic, group, consumer, incarnation }));
    let handles = Limits { handles: 10_000, ..LIMITS };
    let ask = |state: &State, group: &str| state.request(&handles, FOOTPRINT, a, &consumer("t", group));
    assert!(matches!(ask(&state, "g0"), Err(Refusal::Limit { limit: 255, .. })));
    assert!(ask(&state, "g1").is_ok());
    for group in 1..5 {
        (0..200).for_each(|consumer| state.apply(&Event::ConsumerOpened { topic, group, consumer, incarnation }));
    }
    assert!(matches!(ask(&state, "g9"), Err(Refusal::Limit { limit: 1024, .. })));
    let full = TopicOptions { max_subscribers: 1, ..TopicOptions::default() };
    super::ask(&mut state, a, create("few", full)).unwrap();
    super::ask(&mut state, a, plain("few", "g")).unwrap();
    assert!(matches!(super::ask(&mut state, a, plain("few", "h")), Err(Refusal::Limit { limit: 1, .. })));
    let poor = Limits { budget_bytes: 0, ..LIMITS };
    super::ask(&mut state, a, remove("t", "g60", false)).unwrap();
    let refused = state.request(&poor, FOOTPRINT, a, &plain("t", "h"));
    assert!(matches!(refused, Err(Refusal::Budget { needed: 10, .. })));
}

#[test]
fn a_topic_takes_its_groups_along_and_says_who_consumes() {
    let (mut state, a) = with_topic();
    ask(&mut state, a, plain("t", "g")).unwrap();
    ask(&mut state, a, consumer("t", "g")).unwrap();
    let remove = |force| Request::RemoveTopic { topic: "t".to_owned(), force };
    assert!(matches!(ask(&mut state, a, remove(false)), Err(Refusal::InUse { consumers: 1, .. })));
    ask(&mut state, a, remove(true)).unwrap();
    assert!(state.handles_of(a).is_empty());
    assert_eq!(state.reserved_bytes(), 0);
}

#[test]
fn only_consumers_reclaim_and_publish_as_themselves() {
    let (mut state, a) = with_topic();
    let b = join(&mut state);
    ask(&mut state, a, plain("t", "g")).unwrap();
    ask(&mut state, a, consumer("t", "g")).unwrap();
    let reclaim = || Request::Reclaim { topic: 0, group: 0, consumer: 0 };
    assert!(matches!(ask(&mut state, b, reclaim()), Err(Refusal::Protocol { .. })));
    assert!(matches!(ask(&mut state, a, reclaim()).unwrap().reply, Reply::Reclaim { .. }));
    let origin = Identity::Origin { topic: 0, group: 0, consumer: 0 };
    let output = || {
        let (topic, create) = ("out".to_owned(), Some(TopicOptions::default()));
        Request::OpenPublisher { topic, schema: None, create, identity: Some(origin.clone()) }
    };
    assert!(matches!(ask(&mut state, b, output()), Err(Refusal::Protocol { .. })));
    ask(&mut state, a, output()).unwrap();
    let known = |state: &State| state.topic(1).unwrap().identities.len();
    ask(&mut state, a, remove("t", "g", true)).unwrap();
    assert_eq!(known(&state), 1, "the retired group's consumer is there");
    state.apply(&Event::Left { incarnation: a });
    assert_eq!(known(&state), 0, "what a group that is gone published is forgotten");
}

/// Not what others' consumers did, nor who has a name.
#[test]
fn an_end_forgets_what_its_own_consumers_published() {
    let (mut state, a) = with_topic();
    ask(&mut state, a, create("u", TopicOptions::default())).unwrap();
    let groups = [("t", "g"), ("t", "h"), ("u", "g")];
    groups.iter().for_each(|(topic, group)| drop(ask(&mut state, a, consumer_of_new(topic, group)).unwrap()));
    let mut publish = |identity| {
        let (topic, create) = ("out".to_owned(), Some(TopicOptions::default()));
        ask(&mut state, a, Request::OpenPublisher { topic, schema: None, create, identity: Some(identity) }).unwrap();
    };
    let origin = |topic, group| Identity::Origin { topic, group, consumer: 0 };
    let identities = [Identity::Named("n".to_owned()), origin(0, 0), origin(0, 1), origin(1, 0)];
    identities.iter().cloned().for_each(&mut publish);
    let topic = state.names["out"];
    let handles = (0..4).map(|slot| HandleRef::Publisher { topic, slot }).collect();
    ask(&mut state, a, Request::Close { handles }).unwrap();
    let known = |state: &State| Vec::from_iter(state.topic(topic).unwrap().identities.keys().cloned());
    assert_eq!(known(&state), identities);
    ask(&mut state, a, Request::Close { handles: vec![HandleRef::Consumer { topic: 0, group: 0, consumer: 0 }] })
        .unwrap();
    ask(&mut state, a, remove("t", "g", false)).unwrap();
    assert_eq!(known(&state), [&identities[0], &identities[2], &identities[3]].map(Clone::clone));
    state.apply(&Event::TopicRemoved { topic: 0 });
    assert_eq!(known(&state), [&identities[0], &identities[3]].map(Clone::clone));
}

#[test]
fn consumers_are_released_before_what_they_publish_through() {
    let (mut state, a) = with_topic();
    ask(&mut state, a, publisher("out")).unwrap();
    ask(&mut state, a, plain("t", "g")).unwrap();
    ask(&mut state, a, consumer("t", "g")).unwrap();
    let first = HandleRef::Consumer { topic: 0, group: 0, consumer: 0 };
    let handles = state.handles_of(a);
    assert_eq!(handles[0], first);
    let reversed = handles.into_iter().rev().collect();
    let plan = ask_only(&state, a, Request::Close { handles: reversed }).unwrap();
    assert_eq!(plan.events[0], Event::Closed { handle: first });
}
