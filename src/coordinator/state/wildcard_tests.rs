//! Decisions about wildcard subscriptions.

use super::*;

#[test]
fn a_new_topic_comes_with_the_cursors_of_its_wildcards() {
    let mut state = state();
    let (a, b) = (join(&mut state), join(&mut state));
    ask(&mut state, a, create("o.old", TopicOptions::default())).unwrap();
    let opened = ask(&mut state, a, wildcard("o.*")).unwrap();
    assert_eq!(opened.reply, Reply::Wildcard { wildcard: 1 });
    assert_eq!(cursors(&opened), [(0, 0, a, StartAt::Latest)]);
    ask(&mut state, b, wildcard(">")).unwrap();
    let created = ask(&mut state, b, publisher("o.new")).unwrap();
    assert_eq!(cursors(&created), [(1, 0, a, StartAt::Oldest), (1, 1, b, StartAt::Oldest)]);
    assert!(matches!(created.events.first(), Some(Event::TopicCreated { .. })));
    assert!(matches!(created.events.last(), Some(Event::PublisherOpened { .. })));
    let channel = ask(&mut state, b, create("o.channel", mode(Mode::Channel))).unwrap();
    assert!(cursors(&channel).is_empty());
    assert_eq!(state.wildcards()[&1].opened, 2);
    assert_eq!(state.topic(1).unwrap().subscribers.len(), 2);
    let closed = ask(&mut state, a, Request::Close { handles: vec![HandleRef::Wildcard { wildcard: 1 }] }).unwrap();
    assert_eq!(closed.events.len(), 3, "its cursors go with it");
    assert_eq!(state.topic(1).unwrap().subscribers.len(), 1);
    assert_eq!(state.handles_of(a), []);
}

/// Whoever creates a topic does not suffer for those who cannot have it, and they are told.
#[test]
fn a_wildcard_without_room_misses_a_topic() {
    let mut state = state();
    let (a, b, uid) = (join(&mut state), join(&mut state), 1000);
    for _ in 0..2 {
        ask(&mut state, b, wildcard(">")).unwrap();
    }
    let created = ask(&mut state, a, create("one", TopicOptions { max_subscribers: 1, ..mode(Mode::Many) })).unwrap();
    assert_eq!(cursors(&created), [(0, 0, b, StartAt::Oldest)]);
    assert!(matches!(&missed(&created)[..], [(2, why)] if why.contains("more wildcard subscriptions")), "{created:?}");
    // Two handles more, for three that it would take: the subscriptions, one cursor, and two of the next topic.
    let limits = Limits { handles: 4, ..LIMITS };
    let plan = state.request(&limits, FOOTPRINT, a, &create("two", TopicOptions::default())).unwrap();
    assert_eq!((cursors(&plan).len(), missed(&plan).len()), (1, 1));
    plan.events.iter().for_each(|event| state.apply(event));
    assert_eq!((state.wildcards()[&1].opened, state.wildcards()[&2].opened), (2, 2));
    // A third of his finds the first topic full, and has the second.
    let opened = ask(&mut state, a, wildcard("*")).unwrap();
    assert_eq!((cursors(&opened).len(), missed(&opened).len()), (1, 1));
    let mut again = State::default();
    state.snapshot().iter().for_each(|event| again.apply(event));
    assert_eq!(again, state);
    assert_eq!(state.missing_cursors(), [], "what was missed stays so");
    assert_eq!(state.owned[&uid].segments, 3 + 3 + 3, "two topics, and the notices");
}

#[test]
fn what_a_wildcard_keeps_in_the_registry_is_bounded() {
    let mut state = state();
    let a = join(&mut state);
    let schema = |len| Some(Schema { name: "x".repeat(len), size_bytes: 1, align_bytes: 1 });
    let open =
        |schema| Request::OpenWildcard { pattern: ">".to_owned(), schema, start: StartAt::Latest, droppable: true };
    let refused = ask(&mut state, a, open(schema(1025))).unwrap_err();
    assert!(matches!(&refused, Refusal::Options { problem, .. } if problem.contains("1025")), "{refused}");
    ask(&mut state, a, open(schema(1024))).unwrap();
}

#[test]
fn a_returning_owner_keeps_what_it_could_not_name() {
    let mut state = state();
    let a = join(&mut state);
    ask(&mut state, a, wildcard(">")).unwrap();
    ask(&mut state, a, create("t", TopicOptions::default())).unwrap();
    let named = state.rejoin(a, &[HandleRef::Wildcard { wildcard: 1 }]).unwrap();
    assert_eq!(named.events, []);
    let unnamed = state.rejoin(a, &[HandleRef::Subscriber { topic: 0, cursor: 0 }]).unwrap();
    assert_eq!(unnamed.events.len(), 2, "the subscription was dropped, and its cursor with it");
}

#[test]
fn a_topic_whose_creation_was_cut_short_gets_its_cursors() {
    let mut state = state();
    let a = join(&mut state);
    ask(&mut state, a, wildcard(">")).unwrap();
    let plan = state.request(&LIMITS, FOOTPRINT, a, &create("t", TopicOptions::default())).unwrap();
    state.apply(&plan.events[0]);
    assert_eq!(state.missing_cursors(), [(1, 0)]);
    let event = state.cursor_for(1, 0, StartAt::Oldest, FOOTPRINT).unwrap();
    assert_eq!(event, plan.events[1]);
    state.apply(&event);
    assert_eq!(state.missing_cursors(), []);
}
