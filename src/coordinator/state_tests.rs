use super::topics::SHOWN_NAME_BYTES;
use super::*;
use crate::access::Right;
use crate::topic::{Full, Mode, Schema, TopicOptions};

const LIMITS: Limits = Limits {
    participants: 4,
    user_participants: 4,
    topics: 4,
    user_topics: 4,
    user_segments: 100,
    user_queued_fds: 100,
    handles: 100,
    wildcards: 2,
    budget_bytes: 100_000,
};
const FOOTPRINT: Footprint = Footprint { topic: |_| 1_000, cursors: |_| 50, arena: |_| 100, group: |_, _| 10 };

fn state() -> State {
    let mut state = State::default();
    state.apply(&Event::Began { bus: 99, stay: false });
    state
}

fn join(state: &mut State) -> u64 {
    let plan = state.join(&LIMITS, 4000, 1000, vec![1000]).unwrap();
    plan.events.iter().for_each(|event| state.apply(event));
    let Reply::Welcome { incarnation } = plan.reply else { panic!("{plan:?}") };
    incarnation
}

fn ask(state: &mut State, who: u64, request: Request) -> Result<Plan, Refusal> {
    let plan = state.request(&LIMITS, FOOTPRINT, who, &request)?;
    plan.events.iter().for_each(|event| state.apply(event));
    Ok(plan)
}

fn create(topic: &str, options: TopicOptions) -> Request {
    Request::CreateTopic { topic: topic.to_owned(), options, access: None, exist_ok: true, ephemeral: false }
}

fn publisher(topic: &str) -> Request {
    Request::OpenPublisher {
        topic: topic.to_owned(),
        schema: None,
        create: Some(TopicOptions::default()),
        identity: None,
    }
}

fn named(topic: &str, name: &str) -> Request {
    let (topic, identity) = (topic.to_owned(), Some(Identity::Named(name.to_owned())));
    Request::OpenPublisher { topic, schema: None, create: Some(TopicOptions::default()), identity }
}

fn subscriber(topic: &str) -> Request {
    Request::OpenSubscriber { topic: topic.to_owned(), schema: None, start: StartAt::Latest, droppable: false }
}

fn wildcard(pattern: &str) -> Request {
    Request::OpenWildcard { pattern: pattern.to_owned(), schema: None, start: StartAt::Latest, droppable: false }
}

fn ephemeral(topic: &str) -> Request {
    let (topic, options) = (topic.to_owned(), TopicOptions::default());
    Request::CreateTopic { topic, options, access: None, exist_ok: false, ephemeral: true }
}

/// The cursors that a plan opens, as (topic, cursor, incarnation, start).
fn cursors(plan: &Plan) -> Vec<(u64, u32, u64, StartAt)> {
    let opened = |event: &Event| match event {
        Event::SubscriberOpened { topic, cursor, incarnation, start, .. } => {
            Some((*topic, *cursor, *incarnation, *start))
        }
        _ => None,
    };
    plan.events.iter().filter_map(opened).collect()
}

fn missed(plan: &Plan) -> Vec<(u64, String)> {
    let of = |event: &Event| match event {
        Event::WildcardMissed { wildcard, why, .. } => Some((*wildcard, why.to_string())),
        _ => None,
    };
    plan.events.iter().filter_map(of).collect()
}

/// A subscription of another user takes what is his, not what is the creator's or nobody's.
#[test]
fn cursors_of_ones_own_are_within_ones_budget() {
    let mut state = state();
    let (a, open) = (join(&mut state), Access::new().allow(Right::Subscribe, Who::Everybody));
    state.join(&LIMITS, 1, 7, Vec::new()).unwrap().events.iter().for_each(|event| state.apply(event));
    let mut droppable = wildcard(">");
    if let Request::OpenWildcard { droppable, .. } = &mut droppable {
        *droppable = true;
    }
    ask(&mut state, 2, droppable).unwrap();
    let request = |topic: &str| match create(topic, TopicOptions::default()) {
        Request::CreateTopic { topic, options, exist_ok, ephemeral, .. } => {
            Request::CreateTopic { topic, options, access: Some(open.clone()), exist_ok, ephemeral }
        }
        _ => unreachable!(),
    };
    // His notice takes 8,192 bytes, his cursors 50 each.
    let limits = Limits { budget_bytes: 8_192 + 100, ..LIMITS };
    for (topic, had) in [("one", (1, 0)), ("two", (1, 0)), ("three", (0, 1))] {
        let plan = state.request(&limits, FOOTPRINT, a, &request(topic)).unwrap();
        plan.events.iter().for_each(|event| state.apply(event));
        assert_eq!((cursors(&plan).len(), missed(&plan).len()), had, "{topic}");
    }
    assert_eq!((state.reserved[&7], state.owned[&7].segments), (8_292, 3));
    state.apply(&Event::Closed { handle: HandleRef::Wildcard { wildcard: 1 } });
    assert!(!state.reserved.contains_key(&7) && !state.owned.contains_key(&7));
}

#[test]
fn dead_letters_are_for_who_may_consume() {
    let mut state = state();
    let owner = join(&mut state);
    state.join(&LIMITS, 1, 7, Vec::new()).unwrap().events.iter().for_each(|event| state.apply(event));
    let thief = 2;
    let group = |topic: &str, dead_letter: Option<&str>| Request::CreateGroup {
        topic: topic.to_owned(),
        group: "g".to_owned(),
        options: crate::GroupOptions { dead_letter: dead_letter.map(str::to_owned), ..crate::GroupOptions::default() },
        start: StartAt::Latest,
        exist_ok: false,
    };
    ask(&mut state, owner, create("jobs", TopicOptions::default())).unwrap();
    // Before the group is there, and after.
    ask(&mut state, thief, create("dlq.jobs.g", TopicOptions::default())).unwrap();
    let refused = ask(&mut state, owner, group("jobs", None)).unwrap_err();
    assert!(matches!(&refused, Refusal::GroupOptions { problem, .. } if problem.contains("user 7's")), "{refused}");
    ask(&mut state, thief, Request::RemoveTopic { topic: "dlq.jobs.g".to_owned(), force: false }).unwrap();
    ask(&mut state, owner, group("jobs", None)).unwrap();
    let refused = ask(&mut state, thief, create("dlq.jobs.g", TopicOptions::default())).unwrap_err();
    assert!(matches!(refused, Refusal::OthersLetters { uid: 7, .. }), "{refused}");
    let refused = ask(&mut state, thief, publisher("dlq.jobs.g")).unwrap_err();
    assert!(matches!(refused, Refusal::OthersLetters { uid: 7, .. }), "{refused}");
    // Who names it has chosen it; and the owner's own is his own.
    ask(&mut state, owner, create("dlq.jobs.g", TopicOptions::default())).unwrap();
    let shared = create("letters", TopicOptions { envelope: true, ..TopicOptions::default() });
    ask(&mut state, thief, shared).unwrap();
    ask(&mut state, owner, create("more", TopicOptions::default())).unwrap();
    ask(&mut state, owner, group("more", Some("letters"))).unwrap();
    // Without a right one does not learn which groups there are.
    for name in ["g", "none"] {
        let (topic, group) = ("jobs".to_owned(), name.to_owned());
        let refused = ask(&mut state, thief, Request::RemoveGroup { topic, group, force: true }).unwrap_err();
        assert!(matches!(refused, Refusal::NoRight { .. }), "{refused}");
    }
}

#[test]
fn an_ephemeral_topic_goes_before_its_owner() {
    let mut state = state();
    let (a, b) = (join(&mut state), join(&mut state));
    ask(&mut state, a, ephemeral("mine")).unwrap();
    ask(&mut state, b, subscriber("mine")).unwrap();
    let events = state.leave(a);
    assert_eq!(events, [Event::TopicRemoved { topic: 0 }, Event::Left { incarnation: a }]);
    assert_eq!(state.leave(b), [Event::Left { incarnation: b }]);
    assert!(!state.topic(0).unwrap().kept);
}

fn mode(mode: Mode) -> TopicOptions {
    TopicOptions { mode, ..TopicOptions::default() }
}

fn slot(plan: Result<Plan, Refusal>) -> u32 {
    match plan.unwrap().reply {
        Reply::Publisher { slot, .. } => slot,
        Reply::Subscriber { cursor, .. } => cursor,
        other => panic!("{other:?}"),
    }
}

#[test]
fn opening_a_publisher_creates_the_topic_and_then_reuses_arenas() {
    let mut state = state();
    let a = join(&mut state);
    assert_eq!(slot(ask(&mut state, a, publisher("t"))), 0);
    let second = ask(&mut state, a, publisher("t")).unwrap();
    assert!(matches!(
        second.events[..],
        [Event::ArenaAdded { slot: 1, bytes: 100, .. }, Event::PublisherOpened { .. }]
    ));
    assert_eq!(slot(ask(&mut state, a, publisher("t"))), 2);
    ask(&mut state, a, Request::Close { handles: vec![HandleRef::Publisher { topic: 0, slot: 1 }] }).unwrap();
    let reused = ask(&mut state, a, publisher("t")).unwrap();
    assert!(matches!(
        reused.events[..],
        [Event::PublisherOpened { slot: 1, opened: PublisherEntry { publisher: 4, .. }, .. }]
    ));
    assert_eq!(state.reserved_bytes(), 1_200);
}

#[test]
fn an_exclusive_topic_has_one_publisher_and_a_channel_one_of_each() {
    let mut state = state();
    let (a, b) = (join(&mut state), join(&mut state));
    ask(&mut state, a, create("x", mode(Mode::Exclusive))).unwrap();
    ask(&mut state, a, create("c", mode(Mode::Channel))).unwrap();
    for topic in ["x", "c"] {
        ask(&mut state, a, publisher(topic)).unwrap();
        assert!(matches!(ask(&mut state, b, publisher(topic)), Err(Refusal::Taken { pid: 4000, .. })));
    }
    ask(&mut state, a, subscriber("c")).unwrap();
    assert!(matches!(ask(&mut state, b, subscriber("c")), Err(Refusal::Taken { .. })));
    state.apply(&Event::Left { incarnation: a });
    let plan = ask(&mut state, b, publisher("x")).unwrap();
    assert!(matches!(
        plan.events[..],
        [Event::PublisherOpened { slot: 0, opened: PublisherEntry { tenancy: 1, .. }, .. }]
    ));
    ask(&mut state, b, subscriber("c")).unwrap();
}

#[test]
fn schemas_are_compared_and_raw_handles_open_anything() {
    let mut state = state();
    let a = join(&mut state);
    let schema = |name: &str| Some(Schema { name: name.to_owned(), size_bytes: 8, align_bytes: 8 });
    let typed = TopicOptions { schema: schema("Tick"), ..TopicOptions::default() };
    ask(&mut state, a, create("typed", typed)).unwrap();
    ask(&mut state, a, create("raw", TopicOptions::default())).unwrap();
    let open =
        |topic: &str, schema| Request::OpenPublisher { topic: topic.to_owned(), schema, create: None, identity: None };
    ask(&mut state, a, open("typed", schema("Tick"))).unwrap();
    ask(&mut state, a, open("typed", None)).unwrap();
    ask(&mut state, a, open("raw", None)).unwrap();
    for (topic, schema) in [("typed", schema("Tock")), ("raw", schema("Tick"))] {
        assert!(matches!(ask(&mut state, a, open(topic, schema)), Err(Refusal::Schema { .. })));
    }
    assert!(matches!(ask(&mut state, a, open("none", None)), Err(Refusal::UnknownTopic { .. })));
}

#[test]
fn creating_again_compares_every_option() {
    let mut state = state();
    let a = join(&mut state);
    let options = TopicOptions::default();
    ask(&mut state, a, create("t", options.clone())).unwrap();
    assert_eq!(ask(&mut state, a, create("t", options.clone())).unwrap().reply, Reply::Created { existed: true });
    let strict = Request::CreateTopic {
        topic: "t".to_owned(),
        options: options.clone(),
        access: None,
        exist_ok: false,
        ephemeral: false,
    };
    assert!(matches!(ask(&mut state, a, strict), Err(Refusal::AlreadyExists { .. })));
    let others = [
        TopicOptions { messages: 16, ..options.clone() },
        TopicOptions { full: Full::Reject, ..options.clone() },
        TopicOptions { hold: true, ..options.clone() },
        TopicOptions { max_subscribers: 2, ..options },
    ];
    for other in others {
        let Err(Refusal::Exists { difference, .. }) = ask(&mut state, a, create("t", other)) else { panic!() };
        assert!(difference.contains("asked for"), "{difference}");
    }
}

#[test]
fn limits_refuse_and_give_back() {
    let mut state = state();
    let a = join(&mut state);
    for _ in 0..3 {
        join(&mut state);
    }
    assert!(matches!(state.join(&LIMITS, 1, 1, Vec::new()), Err(Refusal::Limit { .. })));
    for topic in ["a", "b", "c", "d"] {
        ask(&mut state, a, create(topic, TopicOptions::default())).unwrap();
    }
    assert!(matches!(ask(&mut state, a, create("e", TopicOptions::default())), Err(Refusal::Limit { .. })));
    ask(&mut state, a, Request::RemoveTopic { topic: "b".to_owned(), force: false }).unwrap();
    let plan = ask(&mut state, a, create("b", TopicOptions::default())).unwrap();
    assert!(matches!(&plan.events[..], [Event::TopicCreated { info, .. }] if info.id == 4), "ids are not reused");

    let poor = Limits { budget_bytes: 4_050, ..LIMITS };
    ask(&mut state, a, publisher("a")).unwrap();
    let refused = state.request(&poor, FOOTPRINT, a, &publisher("a"));
    assert!(matches!(refused, Err(Refusal::Budget { needed: 100, available: 50, .. })));
    let few = TopicOptions { max_publishers: 1, max_subscribers: 1, ..TopicOptions::default() };
    ask(&mut state, a, Request::RemoveTopic { topic: "b".to_owned(), force: false }).unwrap();
    ask(&mut state, a, create("few", few)).unwrap();
    ask(&mut state, a, publisher("few")).unwrap();
    ask(&mut state, a, subscriber("few")).unwrap();
    assert!(matches!(ask(&mut state, a, publisher("few")), Err(Refusal::Limit { limit: 1, .. })));
    assert!(matches!(ask(&mut state, a, subscriber("few")), Err(Refusal::Limit { limit: 1, .. })));
    let handles = Limits { handles: 2, ..LIMITS };
    assert!(matches!(state.request(&handles, FOOTPRINT, a, &publisher("a")), Err(Refusal::Limit { limit: 2, .. })));
}

#[test]
fn each_user_has_limits_of_his_own() {
    let mut state = state();
    let (a, limits) = (join(&mut state), Limits { user_participants: 1, user_topics: 2, user_segments: 7, ..LIMITS });
    let uid = state.participant(a).unwrap().uid;
    let limited = |refused: Result<Plan, Refusal>, expected: &str| match refused {
        Err(Refusal::Limit { what, .. }) => assert_eq!(what, format!("{expected} of user {uid}")),
        other => panic!("{other:?}"),
    };
    limited(state.join(&limits, 1, uid, Vec::new()), "participants");
    // Another user is not concerned.
    state.join(&limits, 1, uid + 1, Vec::new()).unwrap();
    ask(&mut state, a, create("a", TopicOptions::default())).unwrap();
    ask(&mut state, a, create("b", TopicOptions::default())).unwrap();
    let third = create("c", TopicOptions::default());
    limited(state.request(&limits, FOOTPRINT, a, &third), "topics");
    let more_topics = Limits { user_topics: 3, ..limits };
    limited(state.request(&more_topics, FOOTPRINT, a, &third), "segments");
    // The first publisher has an arena; the second gets the seventh segment.
    for _ in 0..2 {
        let plan = state.request(&limits, FOOTPRINT, a, &publisher("a")).unwrap();
        plan.events.iter().for_each(|event| state.apply(event));
    }
    limited(state.request(&limits, FOOTPRINT, a, &publisher("a")), "segments");
    // Replayed from a snapshot, everything counts the same.
    let mut again = State::default();
    state.snapshot().iter().for_each(|event| again.apply(event));
    assert_eq!(again, state);
    ask(&mut state, a, Request::RemoveTopic { topic: "a".to_owned(), force: true }).unwrap();
    state.request(&limits, FOOTPRINT, a, &third).unwrap();
}

#[test]
fn a_topic_in_use_is_removed_by_force_only() {
    let mut state = state();
    let a = join(&mut state);
    ask(&mut state, a, publisher("t")).unwrap();
    ask(&mut state, a, subscriber("t")).unwrap();
    let remove = |force| Request::RemoveTopic { topic: "t".to_owned(), force };
    assert!(matches!(ask(&mut state, a, remove(false)), Err(Refusal::InUse { publishers: 1, subscribers: 1, .. })));
    ask(&mut state, a, remove(true)).unwrap();
    assert!(state.handles_of(a).is_empty() && state.topics().is_empty());
    assert_eq!(state.reserved_bytes(), 0);
}

#[test]
fn a_returning_participant_keeps_what_it_names() {
    let mut state = state();
    let a = join(&mut state);
    ask(&mut state, a, publisher("t")).unwrap();
    ask(&mut state, a, subscriber("t")).unwrap();
    let kept = HandleRef::Subscriber { topic: 0, cursor: 0 };
    let plan = state.rejoin(a, &[kept]).unwrap();
    assert_eq!(plan.events, [Event::Closed { handle: HandleRef::Publisher { topic: 0, slot: 0 } }]);
    plan.events.iter().for_each(|event| state.apply(event));
    assert_eq!(state.handles_of(a), [kept]);
    assert!(matches!(state.rejoin(77, &[]), Err(Refusal::UnknownParticipant { incarnation: 77 })));
}

#[test]
fn only_the_owner_closes_a_handle() {
    let mut state = state();
    let (a, b) = (join(&mut state), join(&mut state));
    ask(&mut state, a, publisher("t")).unwrap();
    let handle = HandleRef::Publisher { topic: 0, slot: 0 };
    assert!(ask(&mut state, b, Request::Close { handles: vec![handle] }).unwrap().events.is_empty());
    let twice = ask(&mut state, a, Request::Close { handles: vec![handle, handle] }).unwrap();
    assert_eq!(twice.events, [Event::Closed { handle }]);
}

/// As much as a packet can name, against as much as a process can hold: compared pair by pair this takes seconds.
#[test]
fn long_lists_of_handles_are_decided_at_once() {
    let mut state = state();
    let a = join(&mut state);
    ask(&mut state, a, create("t", TopicOptions::default())).unwrap();
    let held = |cursor| HandleRef::Subscriber { topic: 0, cursor };
    for cursor in 0..16_384 {
        let (topic, start, wildcard) = (0, StartAt::Latest, None);
        state.apply(&Event::SubscriberOpened {
            topic,
            cursor,
            incarnation: a,
            start,
            droppable: false,
            wildcard,
            own: None,
        });
    }
    let strangers: Vec<HandleRef> = (0..40_000).map(|slot| HandleRef::Publisher { topic: 9, slot }).collect();
    let started = std::time::Instant::now();
    assert_eq!(state.rejoin(a, &strangers).unwrap().events.len(), 16_384);
    let all: Vec<HandleRef> = (0..16_384).map(held).chain((0..16_384).map(held)).collect();
    let plan = ask_only(&state, a, Request::Close { handles: all }).unwrap();
    assert_eq!(plan.events.len(), 16_384);
    assert!(started.elapsed() < std::time::Duration::from_secs(3), "took {:?}", started.elapsed());
}

#[test]
fn status_pages_through_in_the_order_of_names() {
    let mut state = state();
    let a = join(&mut state);
    for topic in ["b", "c", "a"] {
        ask(&mut state, a, create(topic, TopicOptions::default())).unwrap();
    }
    let status = |after: Option<&str>| Request::Status { topic: None, after: after.map(str::to_owned) };
    let Reply::Status { topics, more } = ask(&mut state, a, status(None)).unwrap().reply else { panic!() };
    assert_eq!((topics, more), (vec![2, 0, 1], false));
    let Reply::Status { topics, .. } = ask(&mut state, a, status(Some("b"))).unwrap().reply else { panic!() };
    assert_eq!(topics, [1]);
}

#[test]
fn names_from_outside_are_checked_and_shortened() {
    let mut state = state();
    let a = join(&mut state);
    for bad in ["", "a/b", "..", &"x".repeat(60_000)] {
        let Err(Refusal::Name { name, .. }) = ask(&mut state, a, publisher(bad)) else { panic!("{bad}") };
        assert!(name.len() <= SHOWN_NAME_BYTES);
    }
}

/// A long random life: replaying all events and replaying a snapshot both give the live state.
#[test]
fn replay_equals_live() {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(crate::coordinator::random_u64);
    println!("SEED={seed}");
    let mut random = seed | 1;
    let mut next = move |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let (mut live, mut log) = (state(), vec![Event::Began { bus: 99, stay: false }]);
    for _ in 0..5_000 {
        let known: Vec<u64> = live.participants().keys().copied().collect();
        let who = if known.is_empty() { 0 } else { known[next(known.len() as u64) as usize] };
        let topic = ["a", "b", "c"][next(3) as usize].to_owned();
        let plan = match next(16) {
            0 => live.join(&LIMITS, 1, next(2) as u32, Vec::new()),
            1 if next(4) == 0 => Ok(Plan { events: live.leave(who), reply: Reply::Done }),
            2 => live.rejoin(who, &live.handles_of(who)[..live.handles_of(who).len() / 2]),
            3 => ask_only(
                &live,
                who,
                create(&topic, mode([Mode::Many, Mode::Exclusive, Mode::Channel][next(3) as usize])),
            ),
            4 => ask_only(&live, who, Request::RemoveTopic { topic, force: next(2) == 0 }),
            5 => ask_only(&live, who, publisher(&topic)),
            6 => ask_only(&live, who, named(&topic, ["x", "y"][next(2) as usize])),
            13 => ask_only(&live, who, wildcard(["*", ">", "t1"][next(3) as usize])),
            14 => ask_only(&live, who, ephemeral(&topic)),
            7 | 8 => ask_only(&live, who, subscriber(&topic)),
            9 => ask_only(&live, who, groups::consumer_of_new(&topic, ["g", "h"][next(2) as usize])),
            10 => ask_only(&live, who, groups::rewind(&topic, "g", next(2) == 0)),
            11 => ask_only(&live, who, groups::remove(&topic, ["g", "h"][next(2) as usize], next(2) == 0)),
            12 => groups::outputs(&live, who, &topic),
            _ => ask_only(&live, who, Request::Close { handles: live.handles_of(who).into_iter().take(1).collect() }),
        };
        let events = plan.into_iter().flat_map(|plan| plan.events);
        for event in events.flat_map(|event| settled(event, next(100))) {
            live.apply(&event);
            log.push(event);
        }
    }
    let replay = |events: &[Event]| {
        let mut state = State::default();
        events.iter().for_each(|event| state.apply(event));
        state
    };
    assert!(log.len() > 1_000, "the life was too quiet: {}", log.len());
    assert_eq!(replay(&log), live, "SEED={seed}");
    assert_eq!(replay(&live.snapshot()), live, "SEED={seed}");
}

/// What the estate makes of an event: a fenced publisher loses its identity, unless the coordinator dies first.
fn settled(event: Event, last_number: u64) -> Vec<Event> {
    match event {
        Event::Fenced { topic, slot } if last_number < 90 => {
            vec![event, Event::IdentitySettled { topic, slot, last_number }]
        }
        other => vec![other],
    }
}

#[test]
fn a_name_is_taken_over_and_keeps_its_number() {
    let mut state = state();
    let (a, b) = (join(&mut state), join(&mut state));
    ask(&mut state, a, named("t", "n")).unwrap();
    let plan = ask_only(&state, b, named("t", "n")).unwrap();
    // Memory first: nobody is fenced for a successor that there is no memory for.
    let [arena @ Event::ArenaAdded { .. }, fenced @ Event::Fenced { topic: 0, slot: 0 }, opened] = &plan.events[..]
    else {
        panic!("{plan:?}")
    };
    state.apply(arena);
    state.apply(fenced);
    assert_eq!(state.topic(0).unwrap().unsettled(), [0], "to be done again by whoever reads this");
    state.apply(&Event::IdentitySettled { topic: 0, slot: 0, last_number: 12 });
    assert!(state.topic(0).unwrap().unsettled().is_empty());
    state.apply(opened);
    let Event::PublisherOpened { slot: 1, opened, .. } = opened else { panic!("{opened:?}") };
    assert_eq!((opened.publisher, opened.opening), (1, 2));
    assert_eq!(state.topic(0).unwrap().number_before(opened), Some(12));
    ask(&mut state, a, Request::Close { handles: vec![HandleRef::Publisher { topic: 0, slot: 0 }] }).unwrap();
    let names: Vec<_> = state.topic(0).unwrap().names(None, |_| None).map(|n| (n.last_number, n.slot)).collect();
    assert_eq!(names, [(12, Some(1))], "what its former holder does is no concern of the name");
}

#[test]
fn names_are_limited_and_channels_have_none() {
    let mut state = state();
    let a = join(&mut state);
    ask(&mut state, a, create("c", mode(Mode::Channel))).unwrap();
    assert!(matches!(ask(&mut state, a, named("c", "n")), Err(Refusal::Options { .. })));
    assert!(matches!(ask(&mut state, a, named("t", "a b")), Err(Refusal::Name { .. })));
    ask(&mut state, a, create("t", TopicOptions::default())).unwrap();
    for n in 0..crate::coordinator::limits::MAX_IDENTITIES as u64 {
        let identity = Identity::Named(format!("n{n}"));
        state.apply(&Event::IdentityKnown { topic: 1, identity, publisher: n, last_number: n });
    }
    assert!(matches!(ask(&mut state, a, named("t", "new")), Err(Refusal::Limit { limit: 1024, .. })));
    ask(&mut state, a, named("t", "n7")).unwrap();
}

fn ask_only(state: &State, who: u64, request: Request) -> Result<Plan, Refusal> {
    state.request(&LIMITS, FOOTPRINT, who, &request)
}

#[path = "state/group_tests.rs"]
mod groups;

#[path = "state/wildcard_tests.rs"]
mod wildcards;
