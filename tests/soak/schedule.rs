//! The random schedule: who is at work, what befalls them, and the verdict.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shmbus::{Bus, Consumer, GroupOptions, Start};

use super::checker::{Contract, Witness, check};
use super::common::{LIMIT, Process, Random, Scene, await_that, publisher_after, seed};
use super::history::{Event, Journal, Stamp};
use super::roles::{
    CLOSED, CLOSING, GROUP, INPUT, LAST, OUTPUT, OUTPUTS, OUTPUTS_EACH, PIPE, QUEUE, Stage, TOPICS, message, stamp_of,
    topic,
};
use super::{setting, turn};

/// Long enough that nothing comes back by the end of a lease: only by proof of death.
const LEASE: Duration = Duration::from_secs(600);

/// Who is at work at any time, and whether it may be killed; all may be stopped.
const CAST: [(&str, bool); 13] = [
    ("publish", true),
    ("publish", true),
    ("publish", false),
    ("publish alone", true),
    ("publish as", true),
    ("read", true),
    ("read", true),
    ("read all", false),
    ("consume", true),
    ("consume", true),
    ("consume", false),
    ("pipe", true),
    ("pipe", true),
];

/// Faults that are printed; one that has consequences is found many times.
const SHOWN: usize = 20;

struct Actor {
    role: &'static str,
    mortal: bool,
    life: u64,
    process: Process,
}

struct Play<'a> {
    scene: &'a Scene,
    histories: PathBuf,
    random: Random,
    pace_us: u64,
    actors: Vec<Actor>,
    /// Publishers that were replaced while they lived.
    replaced: Vec<Actor>,
    /// Every life's role and whether it was killed.
    lives: Vec<(&'static str, bool)>,
    /// Who has been stopped, and until when.
    stopped: Vec<(Instant, Pid)>,
    counts: HashMap<&'static str, u32>,
}

impl Play<'_> {
    fn hire(&mut self, role: &'static str, mortal: bool) {
        let life = self.lives.len() as u64;
        self.lives.push((role, false));
        let (seed, pace, histories) = (self.random.next(), self.pace_us, self.histories.display());
        let process = self.scene.start(&format!("soak {role}"), &format!("{life} {seed} {pace} {histories}"));
        self.actors.push(Actor { role, mortal, life, process });
    }

    /// One thing happens.
    fn happen(&mut self) {
        let what = match self.random.below(100) {
            0..45 => self.kill_one(),
            45..70 => self.stop_one(),
            70..78 => self.kill_server("coordinator"),
            78..84 => self.kill_server("keeper"),
            84..87 => self.kill_both(),
            87..92 => self.stop_server(),
            _ => self.replace(),
        };
        *self.counts.entry(what).or_insert(0) += 1;
    }

    fn kill_one(&mut self) -> &'static str {
        let mortals: Vec<usize> = (0..self.actors.len()).filter(|index| self.actors[*index].mortal).collect();
        let actor = self.actors.swap_remove(mortals[self.random.below(mortals.len() as u64) as usize]);
        actor.process.kill();
        self.lives[actor.life as usize].1 = true;
        self.hire(actor.role, true);
        "killed"
    }

    fn stop_one(&mut self) -> &'static str {
        let pid = self.actors[self.random.below(self.actors.len() as u64) as usize].process.pid();
        self.stop(pid);
        "stopped"
    }

    fn stop(&mut self, pid: Pid) {
        let until = Instant::now() + Duration::from_micros(self.random.below(150_000));
        if kill(pid, Signal::SIGSTOP).is_ok() {
            self.stopped.push((until, pid));
        }
    }

    /// A named publisher's place is taken by another while it lives, and perhaps sleeps.
    fn replace(&mut self) -> &'static str {
        if let Some(index) = self.actors.iter().position(|actor| actor.role == "publish as") {
            let actor = self.actors.swap_remove(index);
            if self.random.below(2) == 0 {
                self.stop(actor.process.pid());
            }
            self.replaced.push(actor);
            self.hire("publish as", true);
        }
        "replaced"
    }

    fn kill_server(&mut self, role: &'static str) -> &'static str {
        send(Signal::SIGKILL, &self.scene.servers(Some(role)));
        role
    }

    /// So that neither can replace the other.
    fn kill_both(&mut self) -> &'static str {
        let pids = self.scene.servers(None);
        send(Signal::SIGSTOP, &pids);
        send(Signal::SIGKILL, &pids);
        "both"
    }

    fn stop_server(&mut self) -> &'static str {
        self.scene.servers(Some("coordinator")).into_iter().for_each(|pid| self.stop(pid));
        "coordinator stopped"
    }

    /// Lets those go on whose time has come.
    fn resume(&mut self, now: Instant) {
        self.stopped.retain(|(until, pid)| {
            let over = *until <= now;
            if over {
                let _ = kill(*pid, Signal::SIGCONT);
            }
            !over
        });
    }

    fn run(&mut self, time: Duration) {
        CAST.into_iter().for_each(|(role, mortal)| self.hire(role, mortal));
        let end = Instant::now() + time;
        while Instant::now() < end {
            let next = Instant::now() + Duration::from_micros(self.random.below(40_000));
            while Instant::now() < next {
                thread::sleep(Duration::from_millis(1));
                self.resume(Instant::now());
            }
            self.happen();
        }
        send(Signal::SIGCONT, &self.stopped.iter().map(|(_, pid)| *pid).collect::<Vec<_>>());
    }

    /// Ends the play in order: publishers, groups, readers.
    fn close(&mut self, bus: &Bus, stage: &Stage, notes: &Journal) {
        self.each("read", |reader| reader.expect("reading"));
        stage.reach(CLOSING);
        self.each("publish", |publisher| publisher.expect("done"));
        end_topic(bus, notes, QUEUE);
        end_topic(bus, notes, INPUT);
        await_that("the groups to settle everything", || is_settled(bus, QUEUE) && is_settled(bus, INPUT));
        end_topic(bus, notes, OUTPUT);
        self.each("read", |reader| reader.expect("done"));
        stage.reach(CLOSED);
        self.each("consume", |consumer| consumer.expect("done"));
        self.each("pipe", |pipeline| pipeline.expect("done"));
    }

    fn each(&mut self, role: &str, mut order: impl FnMut(&mut Process)) {
        let actors = self.actors.iter_mut().chain(&mut self.replaced);
        actors.filter(|actor| actor.role.starts_with(role)).for_each(|actor| order(&mut actor.process));
    }

    /// What everybody has written down.
    fn witnesses(&self) -> Vec<Witness> {
        let witness = |(life, (role, killed)): (usize, &(&str, bool))| Witness {
            name: format!("{role} {life}"),
            killed: *killed,
            reads_all_of: if *role == "read all" { TOPICS.to_vec() } else { Vec::new() },
            events: Journal::open(&self.histories.join(life.to_string())).read(),
        };
        self.lives.iter().enumerate().map(witness).collect()
    }
}

/// Sends a signal to processes, some of which may be dead already.
fn send(signal: Signal, pids: &[Pid]) {
    for pid in pids {
        let _ = kill(*pid, signal);
    }
}

/// Publishes the message that ends a topic.
fn end_topic(bus: &Bus, notes: &Journal, number: u32) {
    let stamp = Stamp { origin: LAST, number: 1, before: 0, after: 0 };
    let mut publisher = publisher_after(bus, &topic(number));
    notes.write(Event::Attempted { topic: number, stamp });
    let sequence = publisher.publish_timeout(&message(stamp, 0), LIMIT).unwrap().get();
    notes.write(Event::Acknowledged { topic: number, stamp, sequence });
}

fn is_settled(bus: &Bus, number: u32) -> bool {
    let status = bus.topic(topic(number).name()).unwrap();
    status.groups.iter().all(|group| group.floor == status.tail_sequence)
}

/// A reader in this process, which is neither killed nor stopped. Whatever else dies, it keeps the bus alive.
fn witness(bus: &Bus, histories: &Path, number: u32) -> JoinHandle<Witness> {
    let mut subscriber = bus.subscriber(topic(number)).start(Start::Oldest).open().unwrap();
    let journal = Journal::open(&histories.join(format!("witness-{number}")));
    thread::spawn(move || {
        loop {
            let received = subscriber.recv().unwrap();
            let stamp = stamp_of(&received);
            journal.write(Event::Received { topic: number, sequence: received.sequence().get(), stamp });
            if stamp.is_some_and(|stamp| stamp.origin == LAST) {
                let name = format!("witness of {number}");
                return Witness { name, killed: false, reads_all_of: vec![number], events: journal.read() };
            }
        }
    })
}

/// Topics and groups, with a consumer of each that takes nothing: with its help they outlive the bus's processes.
fn prepare(bus: &Bus) -> [Consumer<[u8]>; 2] {
    TOPICS.into_iter().for_each(|number| assert!(!bus.create(&topic(number)).unwrap()));
    let options = [GroupOptions::new(), GroupOptions::new().effectively_once()].map(|options| options.lease(LEASE));
    let groups = [(QUEUE, GROUP), (INPUT, PIPE)];
    std::array::from_fn(|index| {
        let (number, group) = groups[index];
        bus.create_group(topic(number).name(), group, &options[index], Start::Oldest, false).unwrap();
        bus.consumer(topic(number), group).existing().open().unwrap()
    })
}

#[test]
fn whatever_happens_to_processes_the_history_keeps_the_contract() {
    let _turn = turn();
    let seconds = setting("SHMBUS_SOAK_SECONDS").unwrap_or(5);
    let scene = Scene::new("soak");
    let bus = scene.open();
    let _idle = prepare(&bus);
    let histories = tempfile::Builder::new().prefix("shmbus-test-").tempdir().unwrap();
    let stage = Stage::open(&histories.path().join("stage"));
    let notes = Journal::open(&histories.path().join("notes"));
    let witnesses = TOPICS.map(|number| witness(&bus, histories.path(), number));
    let mut play = Play {
        scene: &scene,
        histories: histories.path().to_owned(),
        random: Random::new(seed()),
        pace_us: (seconds * 10).max(200),
        actors: Vec::new(),
        replaced: Vec::new(),
        lives: Vec::new(),
        stopped: Vec::new(),
        counts: HashMap::new(),
    };
    play.run(Duration::from_secs(seconds));
    play.close(&bus, &stage, &notes);
    let mut history = play.witnesses();
    history.extend(witnesses.map(|witness| witness.join().unwrap()));
    let notes = notes.read();
    history.push(Witness { name: "the test".to_owned(), killed: false, reads_all_of: Vec::new(), events: notes });
    let events: usize = history.iter().map(|witness| witness.events.len()).sum();
    println!("{} lives, {events} events; {:?}", play.lives.len(), play.counts);
    let contract = Contract {
        queue: QUEUE,
        input: INPUT,
        output: OUTPUT,
        output_origin: OUTPUTS,
        outputs: OUTPUTS_EACH,
        last: LAST,
    };
    let faults = check(&history, &contract);
    faults.iter().take(SHOWN).for_each(|fault| println!("{fault:?}"));
    assert!(faults.is_empty(), "{} faults", faults.len());
}
