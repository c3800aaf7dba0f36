//! Whether a history keeps the contract (SPEC §3). Knows nothing of processes: it gets what they wrote down.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::history::{Event, Stamp};

/// One process's part of the history.
pub(crate) struct Witness {
    pub(crate) name: String,
    /// Whether it was killed: then the last things it did may be missing.
    pub(crate) killed: bool,
    /// Topics that it held back from their first message to their last.
    pub(crate) reads_all_of: Vec<u32>,
    pub(crate) events: Vec<Event>,
}

/// What a history is measured against, beside itself.
pub(crate) struct Contract {
    /// The topic with a group at least once.
    pub(crate) queue: u32,
    /// The topic whose messages became outputs, and the topic and origin of those.
    pub(crate) input: u32,
    pub(crate) output: u32,
    pub(crate) output_origin: u64,
    /// Outputs of each input.
    pub(crate) outputs: u64,
    /// The origin of the message that ends each topic, of which nothing is made.
    pub(crate) last: u64,
}

/// How the contract was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// Acknowledged and not there, or not given to any consumer, or an input without its outputs.
    Lost,
    /// There, or given out, more often than allowed.
    Duplicated,
    /// Never published, or elsewhere than its publisher was told, or different for two readers.
    Unexpected,
    OutOfOrder,
    /// A reader passed over what others saw.
    Skipped,
    /// A message, or a batch, in parts.
    Torn,
    /// A process saw an error that must not be.
    Failed,
}

/// A break of the contract, and where.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    #[allow(dead_code, reason = "for whoever reads the failed test")]
    pub(crate) what: String,
}

/// A topic's messages by their sequences.
type Log = BTreeMap<u64, Stamp>;

struct Checker<'a> {
    witnesses: &'a [Witness],
    contract: &'a Contract,
    /// What all readers together saw.
    logs: HashMap<u32, Log>,
    faults: Vec<Fault>,
}

/// Everything that is wrong with a history that has come to its end.
pub(crate) fn check(witnesses: &[Witness], contract: &Contract) -> Vec<Fault> {
    let mut checker = Checker { witnesses, contract, logs: HashMap::new(), faults: Vec::new() };
    checker.collect();
    checker.batches();
    checker.publishers();
    witnesses.iter().for_each(|witness| checker.reader(witness));
    checker.group();
    checker.outputs();
    checker.faults
}

impl Checker<'_> {
    fn fault(&mut self, kind: Kind, what: String) {
        self.faults.push(Fault { kind, what });
    }

    /// Puts the logs together; every reader must have seen the same.
    fn collect(&mut self) {
        for witness in self.witnesses {
            for event in &witness.events {
                let (topic, sequence, stamp) = match *event {
                    Event::Received { topic, sequence, stamp } => (topic, sequence, stamp),
                    Event::Given { topic, sequence, stamp, .. } => (topic, sequence, stamp),
                    Event::Failed => {
                        self.fault(Kind::Failed, witness.name.clone());
                        continue;
                    }
                    _ => continue,
                };
                let Some(stamp) = stamp else {
                    self.fault(Kind::Torn, format!("{}: {topic}/{sequence}", witness.name));
                    continue;
                };
                let seen = *self.logs.entry(topic).or_default().entry(sequence).or_insert(stamp);
                if seen != stamp {
                    let what = format!("{}: {topic}/{sequence} is {stamp:?}, to others {seen:?}", witness.name);
                    self.fault(Kind::Unexpected, what);
                }
            }
        }
    }

    /// Batches are whole and without anything in between.
    fn batches(&mut self) {
        let mut faults = Vec::new();
        for (topic, log) in &self.logs {
            let mut open: Option<(u64, Stamp)> = None;
            for (sequence, stamp) in log {
                let expected = open.filter(|(_, last)| last.after > 0).map(|(at, last)| {
                    let Stamp { origin, number, before, after } = last;
                    (at + 1, Stamp { origin, number: number + 1, before: before + 1, after: after - 1 })
                });
                let is_next = expected.map_or(stamp.before == 0, |expected| expected == (*sequence, *stamp));
                if !is_next {
                    faults.push(format!("{topic}/{sequence}: {stamp:?} after {open:?}"));
                }
                open = Some((*sequence, *stamp));
            }
            if let Some((sequence, stamp)) = open.filter(|(_, last)| last.after > 0) {
                faults.push(format!("{topic}/{sequence}: {stamp:?} is the end"));
            }
        }
        faults.into_iter().for_each(|what| self.fault(Kind::Torn, what));
    }

    /// Every message was attempted, is there once, in its publisher's order, and where its publisher was told.
    fn publishers(&mut self) {
        let mut attempted: HashSet<(u32, Stamp)> = HashSet::new();
        let mut acknowledged: Vec<(u32, Stamp, u64)> = Vec::new();
        for event in self.witnesses.iter().flat_map(|witness| &witness.events) {
            match *event {
                Event::Attempted { topic, stamp } => drop(attempted.insert((topic, stamp))),
                Event::Acknowledged { topic, stamp, sequence } => acknowledged.push((topic, stamp, sequence)),
                _ => {}
            }
        }
        let mut places: HashMap<(u32, u64, u64), u64> = HashMap::new();
        let mut last_of: HashMap<(u32, u64), u64> = HashMap::new();
        for (topic, log) in std::mem::take(&mut self.logs) {
            for (sequence, stamp) in &log {
                let what = || format!("{topic}/{sequence}: {stamp:?}");
                if !attempted.contains(&(topic, *stamp)) {
                    self.fault(Kind::Unexpected, what());
                }
                if let Some(other) = places.insert((topic, stamp.origin, stamp.number), *sequence) {
                    self.fault(Kind::Duplicated, format!("{} is at {other} as well", what()));
                }
                // Outputs come as their inputs are finished: in no order.
                let last = last_of.entry((topic, stamp.origin)).or_insert(0);
                if stamp.origin != self.contract.output_origin && stamp.number < *last {
                    let last = *last;
                    self.fault(Kind::OutOfOrder, format!("{} after number {last}", what()));
                }
                *last = stamp.number.max(*last);
            }
            self.logs.insert(topic, log);
        }
        for (topic, stamp, sequence) in acknowledged {
            match places.get(&(topic, stamp.origin, stamp.number)) {
                None => self.fault(Kind::Lost, format!("{topic}/{sequence}: {stamp:?} was acknowledged")),
                Some(found) if *found != sequence => {
                    self.fault(Kind::Unexpected, format!("{topic}/{found}: {stamp:?} was acknowledged as {sequence}"));
                }
                Some(_) => {}
            }
        }
        self.numbers_are_dense();
    }

    /// Whoever publishes a number has published all before it.
    fn numbers_are_dense(&mut self) {
        let mut counts: HashMap<(u32, u64), (HashSet<u64>, u64)> = HashMap::new();
        for (topic, log) in &self.logs {
            for stamp in log.values().filter(|stamp| stamp.origin != self.contract.output_origin) {
                let (numbers, last) = counts.entry((*topic, stamp.origin)).or_default();
                numbers.insert(stamp.number);
                *last = stamp.number.max(*last);
            }
        }
        for ((topic, origin), (numbers, last)) in counts {
            if let Some(missing) = (1..=last).find(|number| !numbers.contains(number)) {
                self.fault(Kind::Lost, format!("{topic}: number {missing} of {origin:#x}, which came to {last}"));
            }
        }
    }

    /// A subscriber meets each sequence once, in order, and everything from its first to its last; one that was there from
    /// the beginning to the end meets everything.
    fn reader(&mut self, witness: &Witness) {
        let mut runs: HashMap<u32, Vec<u64>> = HashMap::new();
        for event in &witness.events {
            if let Event::Received { topic, sequence, .. } = *event {
                runs.entry(topic).or_default().push(sequence);
            }
        }
        for topic in &witness.reads_all_of {
            let run = runs.get(topic).map_or(&[][..], Vec::as_slice);
            let ends = self.logs.get(topic).and_then(|log| Some((*log.keys().next()?, *log.keys().next_back()?)));
            if let Some((first, last)) = ends
                && (run.first() != Some(&first) || run.last() != Some(&last))
            {
                let what = format!("{}: {topic}/{:?}..{:?} of {first}..{last}", witness.name, run.first(), run.last());
                self.fault(Kind::Lost, what);
            }
        }
        for (topic, run) in runs {
            for pair in run.windows(2) {
                let [before, after] = [pair[0], pair[1]];
                let what = format!("{}: {topic}/{after} after {before}", witness.name);
                match before.cmp(&after) {
                    std::cmp::Ordering::Equal => self.fault(Kind::Duplicated, what),
                    std::cmp::Ordering::Greater => self.fault(Kind::OutOfOrder, what),
                    std::cmp::Ordering::Less => {
                        if self.logs[&topic].range(before + 1..after).next().is_some() {
                            self.fault(Kind::Skipped, what);
                        }
                    }
                }
            }
        }
    }

    /// Each message went to a consumer, and to another one only after the first was killed with it in hand.
    fn group(&mut self) {
        /// One delivery: when, which attempt, whose, and whether that one's ack returned.
        type Delivery = (u64, u32, usize, bool);
        let queue = self.contract.queue;
        let mut given: BTreeMap<u64, Vec<Delivery>> = BTreeMap::new();
        for (index, witness) in self.witnesses.iter().enumerate() {
            let acked = |event: &Event| match *event {
                Event::Acked { topic, sequence } if topic == queue => Some(sequence),
                _ => None,
            };
            let acked: HashSet<u64> = witness.events.iter().filter_map(acked).collect();
            for event in &witness.events {
                if let Event::Given { topic, sequence, attempt, at_ns, .. } = *event
                    && topic == queue
                {
                    given.entry(sequence).or_default().push((at_ns, attempt, index, acked.contains(&sequence)));
                }
            }
        }
        let known: Vec<u64> = self.logs.get(&queue).into_iter().flat_map(|log| log.keys().copied()).collect();
        for sequence in known.iter().filter(|sequence| !given.contains_key(sequence)) {
            self.fault(Kind::Lost, format!("{queue}/{sequence} was given to no consumer"));
        }
        for (sequence, mut deliveries) in given {
            deliveries.sort_unstable();
            for pair in deliveries.windows(2) {
                let [(_, attempt, holder, acked), (_, later, next, _)] = [pair[0], pair[1]];
                let [holder, next] = [&self.witnesses[holder], &self.witnesses[next]];
                if !holder.killed || acked || later <= attempt {
                    let what = format!(
                        "{queue}/{sequence}: attempt {later} by {} after attempt {attempt} by {} (killed: {}, acked: {acked})",
                        next.name, holder.name, holder.killed
                    );
                    self.fault(Kind::Duplicated, what);
                }
            }
        }
    }

    /// Each input has its outputs; that they are there once has been seen already.
    fn outputs(&mut self) {
        let Contract { input, output, output_origin, outputs, last, .. } = *self.contract;
        let made = self.logs.get(&output).into_iter().flat_map(Log::values);
        let made: HashSet<u64> = made.filter(|stamp| stamp.origin == output_origin).map(|stamp| stamp.number).collect();
        let inputs: Vec<(u64, Stamp)> =
            self.logs.get(&input).into_iter().flatten().map(|(sequence, stamp)| (*sequence, *stamp)).collect();
        for (sequence, _) in inputs.iter().filter(|(_, stamp)| stamp.origin != last) {
            for number in (sequence * outputs..).take(outputs as usize) {
                if !made.contains(&number) {
                    self.fault(Kind::Lost, format!("{input}/{sequence} has no output {number}"));
                }
            }
        }
        let inputs: HashSet<u64> = inputs.into_iter().map(|(sequence, _)| sequence).collect();
        for number in made.into_iter().filter(|number| !inputs.contains(&(number / outputs))) {
            self.fault(Kind::Unexpected, format!("{output}: output {number} has no input"));
        }
    }
}

mod tests {
    use super::*;

    const CONTRACT: Contract = Contract { queue: 0, input: 1, output: 2, output_origin: 77, outputs: 2, last: 99 };

    fn single(origin: u64, number: u64) -> Stamp {
        Stamp { origin, number, before: 0, after: 0 }
    }

    /// Origin 5's numbers 1 and 2 alone, 3 and 4 as a batch; a hole at 2; an input at 0 with its two outputs.
    fn messages() -> Vec<(u32, u64, Stamp)> {
        let batch = |number, before, after| Stamp { origin: 5, number, before, after };
        let output = |number, before, after| Stamp { origin: 77, number, before, after };
        let queue = [(0, 0, single(5, 1)), (0, 1, single(5, 2)), (0, 3, batch(3, 0, 1)), (0, 4, batch(4, 1, 0))];
        let rest = [(1, 0, single(6, 1)), (2, 0, output(0, 0, 1)), (2, 1, output(1, 1, 0))];
        queue.into_iter().chain(rest).collect()
    }

    const PUBLISHER: usize = 0;
    const STEADY: usize = 1;
    const CONSUMER: usize = 2;
    const HEIR: usize = 3;

    /// A history in which everything is right.
    fn sound() -> Vec<Witness> {
        let witness = |name: &str, killed, reads_all_of: &[u32], events| {
            let (name, reads_all_of) = (name.to_owned(), reads_all_of.to_vec());
            Witness { name, killed, reads_all_of, events }
        };
        let published = messages().into_iter().flat_map(|(topic, sequence, stamp)| {
            [Event::Attempted { topic, stamp }, Event::Acknowledged { topic, stamp, sequence }]
        });
        let read = |(topic, sequence, stamp)| Event::Received { topic, sequence, stamp: Some(stamp) };
        let given = |(topic, sequence, stamp), attempt, at_ns| {
            let stamp = Some(stamp);
            Event::Given { topic, sequence, stamp, attempt, at_ns }
        };
        let queue: Vec<_> = messages().into_iter().filter(|(topic, _, _)| *topic == 0).collect();
        let acked = |sequence| Event::Acked { topic: 0, sequence };
        let first = vec![given(queue[0], 1, 1), acked(0), given(queue[1], 1, 2)];
        let heir = [(1, 2), (2, 1), (3, 1)];
        let heir = heir.map(|(index, attempt)| [given(queue[index], attempt, 9), acked(queue[index].1)]);
        vec![
            witness("publisher", false, &[], published.collect()),
            witness("steady", false, &[0, 1, 2], messages().into_iter().map(read).collect()),
            witness("consumer", true, &[], first),
            witness("heir", false, &[], heir.into_iter().flatten().collect()),
        ]
    }

    fn kinds(history: &[Witness]) -> Vec<Kind> {
        check(history, &CONTRACT).into_iter().map(|fault| fault.kind).collect()
    }

    /// The kinds found after `plant` was applied.
    fn found(plant: impl FnOnce(&mut Vec<Witness>)) -> Vec<Kind> {
        let mut history = sound();
        plant(&mut history);
        kinds(&history)
    }

    /// Puts the queue's messages at other places, the same for everybody.
    fn renumber_queue(history: &mut [Witness], place_of: impl Fn(u64) -> u64) {
        for event in history.iter_mut().flat_map(|witness| &mut witness.events) {
            match event {
                Event::Received { topic: 0, sequence, .. }
                | Event::Given { topic: 0, sequence, .. }
                | Event::Acknowledged { topic: 0, sequence, .. }
                | Event::Acked { topic: 0, sequence } => *sequence = place_of(*sequence),
                _ => {}
            }
        }
    }

    #[test]
    fn the_checker_is_content_with_a_sound_history() {
        assert_eq!(kinds(&sound()), []);
    }

    #[test]
    fn the_checker_finds_what_is_lost() {
        let lost = found(|history| {
            let is_second = |event: &Event| {
                matches!(
                    *event,
                    Event::Received { topic: 0, sequence: 1, .. } | Event::Given { topic: 0, sequence: 1, .. }
                )
            };
            history.iter_mut().for_each(|witness| witness.events.retain(|event| !is_second(event)));
        });
        assert_eq!(lost, [Kind::Lost, Kind::Lost], "as acknowledged, and as a gap in the numbers");
        let cut_short = found(|history| {
            history[STEADY].events.pop();
        });
        assert!(cut_short.contains(&Kind::Torn) && cut_short.contains(&Kind::Lost), "{cut_short:?}");
        let late = found(|history| {
            history[STEADY].events.remove(0);
        });
        assert_eq!(late, [Kind::Lost], "a steady reader misses the first");
        let never_given = found(|history| history[HEIR].events.truncate(4));
        assert_eq!(never_given, [Kind::Lost]);
        let without_output = found(|history| {
            let is_output = |event: &Event| {
                matches!(
                    *event,
                    Event::Received { topic: 2, .. }
                        | Event::Attempted { topic: 2, .. }
                        | Event::Acknowledged { topic: 2, .. }
                )
            };
            history.iter_mut().for_each(|witness| witness.events.retain(|event| !is_output(event)));
        });
        assert_eq!(without_output, [Kind::Lost, Kind::Lost]);
    }

    #[test]
    fn the_checker_finds_duplicates() {
        let second_copy = Event::Received { topic: 0, sequence: 5, stamp: Some(single(5, 2)) };
        let twice_in_log = found(|history| history[STEADY].events.insert(4, second_copy));
        assert!(twice_in_log.contains(&Kind::Duplicated), "{twice_in_log:?}");
        let twice_to_one = found(|history| {
            let again = history[STEADY].events[1];
            history[STEADY].events.insert(1, again);
        });
        assert_eq!(twice_to_one, [Kind::Duplicated]);
        assert_eq!(found(|history| history[CONSUMER].killed = false), [Kind::Duplicated], "the holder lived");
        let acked = Event::Acked { topic: 0, sequence: 1 };
        assert_eq!(found(|history| history[CONSUMER].events.push(acked)), [Kind::Duplicated], "given after its ack");
    }

    #[test]
    fn the_checker_finds_the_unexpected() {
        let invented = Event::Received { topic: 0, sequence: 5, stamp: Some(single(8, 1)) };
        assert_eq!(found(|history| history[STEADY].events.insert(4, invented)), [Kind::Unexpected, Kind::Lost]);
        let different = Event::Given { topic: 0, sequence: 0, stamp: Some(single(5, 2)), attempt: 1, at_ns: 1 };
        assert_eq!(found(|history| history[CONSUMER].events[0] = different), [Kind::Unexpected]);
        let elsewhere = Event::Acknowledged { topic: 0, stamp: single(5, 1), sequence: 3 };
        assert_eq!(found(|history| history[PUBLISHER].events[1] = elsewhere), [Kind::Unexpected]);
    }

    #[test]
    fn the_checker_finds_disorder_and_what_is_skipped() {
        assert_eq!(found(|history| history[STEADY].events[0..3].swap(1, 2))[0], Kind::Skipped);
        assert!(found(|history| history[STEADY].events[0..3].swap(1, 2)).contains(&Kind::OutOfOrder));
        let passed_over = found(|history| {
            history[STEADY].events.remove(1);
        });
        assert_eq!(passed_over, [Kind::Skipped]);
        let swapped = found(|history| {
            renumber_queue(history, |sequence| if sequence < 2 { 1 - sequence } else { sequence });
            history[STEADY].events[0..2].reverse();
        });
        assert_eq!(swapped, [Kind::OutOfOrder], "a publisher's numbers");
    }

    #[test]
    fn the_checker_finds_what_is_torn_or_failed() {
        let torn = Event::Received { topic: 0, sequence: 1, stamp: None };
        assert_eq!(found(|history| history[STEADY].events[1] = torn), [Kind::Torn]);
        let pulled_apart = found(|history| {
            renumber_queue(history, |sequence| if sequence == 4 { 5 } else { sequence });
        });
        assert_eq!(pulled_apart, [Kind::Torn]);
        assert_eq!(found(|history| history[PUBLISHER].events.push(Event::Failed)), [Kind::Failed]);
    }
}
