//! The coordinator as the victim: killed before each write to shared memory and each system call of a request, it must leave
//! behind what its successor can finish or undo. And that successor as the victim: killed anywhere from its first instruction on,
//! over its start, the replay of the registry and what it repairs, it must leave behind what a third one can.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shmbus::{Bus, ConnectError, OpenError, Publisher, Refusal, Start, Subscriber, Topic};

use crate::checker::{Violation, message, publisher};
use crate::common::{Process, Random, Scene, await_that};
use crate::group_deeds;
use crate::mutant;
use crate::runner::{MAX_STEPS, MAX_VIOLATIONS, Report, covers_reads, is_long, most_tries};
use crate::shared_access::{Effect, Lens};
use crate::tracer::{Place, Stop, Tracee};

/// Kills on one bus: a keeper restarts so many short-lived coordinators at once, and delays those after them.
const KILLS_A_BUS: usize = 6;

/// The same where each kill is that of two coordinators.
const DOUBLE_KILLS_A_BUS: usize = 3;

/// So many buses at a time.
const SIDE_BY_SIDE: usize = 4;

/// Kills of a short run, for each deed.
const SHORT_KILLS: usize = 8;

/// The same where each is that of two coordinators.
const SHORT_DOUBLE_KILLS: usize = 2 * DOUBLE_KILLS_A_BUS;

/// Places where a long run kills the first coordinator over a deed, before its successor: one is before all of it.
const FIRST_PLACES: usize = 4;

/// How long a successor may take to come to its program.
const START: Duration = Duration::from_secs(5);

/// The coordinator sleeps for longer than this when it has nothing left to do.
const IDLE: Duration = Duration::from_millis(50);

/// How long a place may take to be reached; a coordinator that does not come there this time is killed all the same.
const PATIENCE: Duration = Duration::from_millis(300);

/// The same for one that is stepped there: who adopts a bus waits for those who do not come. Its clients wait for twice as long.
const STEPPED_PATIENCE: Duration = Duration::from_secs(5);

/// How long recovery and what a client asks for may take; for a machine that is very busy.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// The deed of one that comes after coordinator and keeper have died.
pub(crate) const ADOPTION: &str = "adopt a bus";

/// Something that a coordinator does for a client.
pub(crate) struct Deed {
    pub(crate) name: &'static str,
    /// What must be there before: done anew for each kill.
    pub(crate) prepare: fn(&Scene, &Bus) -> Result<Option<Process>, Violation>,
    /// What is asked for, of the bus or of the process that `prepare` started, and whether it was done right.
    pub(crate) act: fn(&Bus, Option<Process>) -> Result<(), Violation>,
}

/// All deeds.
pub(crate) fn all() -> Vec<Deed> {
    let mut all = vec![
        Deed { name: "join", prepare: prepare_newcomer, act: go_on },
        Deed { name: "create a topic", prepare: nothing, act: |bus, _| text(create(bus)) },
        Deed { name: "open a publisher", prepare: prepare_topic, act: |bus, _| text(open_publisher(bus)) },
        Deed {
            name: "open one of many publishers",
            prepare: prepare_many,
            act: |bus, _| text(open_publisher_of_many(bus)),
        },
        Deed { name: "open a subscriber", prepare: prepare_topic, act: |bus, _| text(open_subscriber(bus)) },
        Deed { name: "remove a topic", prepare: prepare_topic, act: |bus, _| remove(bus) },
        Deed { name: "bury a participant", prepare: |scene, bus| prepare_participant(scene, bus, "all"), act: bury },
        Deed {
            name: "bury amid a batch",
            prepare: |scene, bus| prepare_participant(scene, bus, "half a batch"),
            act: bury_amid_a_batch,
        },
    ];
    all.extend(group_deeds::all());
    all
}

fn text<T>(outcome: Result<T, OpenError>) -> Result<T, Violation> {
    outcome.map_err(|error| format!("the client's request failed: {error}"))
}

/// The process is told to go on, and does.
pub(crate) fn go_on(_: &Bus, process: Option<Process>) -> Result<(), Violation> {
    let mut process = process.ok_or("no process")?;
    process.tell("go on");
    process.expect("done");
    Ok(())
}

/// The process is killed.
fn bury(_: &Bus, process: Option<Process>) -> Result<(), Violation> {
    process.ok_or("no process")?.kill();
    Ok(())
}

/// What it had not committed is not there, nor is it after others have published.
fn bury_amid_a_batch(bus: &Bus, process: Option<Process>) -> Result<(), Violation> {
    process.ok_or("no process")?.kill();
    let mut successor = publisher(bus, &subject())?;
    let mut reader = text(bus.subscriber(subject()).start(Start::Oldest).open())?;
    let messages = [&b"retained"[..], b"held", b"after"];
    successor.publish(messages[2]).map_err(|error| error.to_string())?;
    for expected in messages {
        let found = reader.recv_timeout(DEADLINE).map_err(|error| error.to_string())?;
        if found[..] != *expected {
            return Err(format!("sequence {} came from a batch that was never committed", found.sequence()));
        }
    }
    match reader.try_recv() {
        Ok(None) => Ok(()),
        other => Err(format!("expected nothing more, found {other:?}")),
    }
}

/// Who was stopped comes back in time, and what it alone had is there.
fn find_adopted(bus: &Bus, process: Option<Process>) -> Result<(), Violation> {
    let process = process.ok_or("no process")?;
    process.signal(Signal::SIGCONT);
    let mut reader = text(bus.subscriber(subject()).start(Start::Oldest).open())?;
    for expected in [&b"retained"[..], b"held"] {
        let found = reader.recv_timeout(DEADLINE).map_err(|error| error.to_string())?;
        if found[..] != *expected {
            return Err(format!("sequence {} is another message after the adoption", found.sequence()));
        }
    }
    process.kill();
    Ok(())
}

/// What the dead publisher alone had is not there, and nothing is in its place.
fn find_without_the_dead(bus: &Bus, process: Option<Process>) -> Result<(), Violation> {
    let process = process.ok_or("no process")?;
    process.signal(Signal::SIGCONT);
    let mut reader = text(bus.subscriber(subject_of_many()).start(Start::Oldest).open())?;
    let mut publisher = text(bus.publisher(subject_of_many()))?;
    publisher.publish(b"after").map_err(|error| error.to_string())?;
    let found = reader.recv_timeout(DEADLINE).map_err(|error| error.to_string())?;
    if found[..] != *b"after" {
        return Err(format!("sequence {} is a message that nobody has: {:?}", found.sequence(), &found[..]));
    }
    process.kill();
    Ok(())
}

fn traffic() -> Topic<[u8]> {
    Topic::new("traffic").messages(64).bytes(64 << 10)
}

/// The topic of the deed; not there between two kills.
pub(crate) fn subject() -> Topic<[u8]> {
    Topic::new("subject").exclusive().messages(64).bytes(64 << 10)
}

pub(crate) fn subject_of_many() -> Topic<[u8]> {
    Topic::new("subject.many").messages(64).bytes(64 << 10)
}

fn nothing(_: &Scene, _: &Bus) -> Result<Option<Process>, Violation> {
    Ok(None)
}

fn prepare_topic(_: &Scene, bus: &Bus) -> Result<Option<Process>, Violation> {
    let publish = || -> Result<(), Box<dyn std::error::Error>> {
        bus.create(&subject())?;
        Ok(bus.publisher(subject())?.publish(b"retained").map(drop)?)
    };
    publish().map(|()| None).map_err(|error| format!("preparing: {error}"))
}

/// Its next publisher will need an arena that its reader does not know.
fn prepare_many(_: &Scene, bus: &Bus) -> Result<Option<Process>, Violation> {
    bus.create(&subject_of_many()).map(|_| None).map_err(|error| format!("preparing: {error}"))
}

fn prepare_participant(scene: &Scene, bus: &Bus, what: &str) -> Result<Option<Process>, Violation> {
    prepare_topic(scene, bus)?;
    let mut process = scene.start("hold", what);
    process.expect("holding");
    Ok(Some(process))
}

/// A process on a topic on which another one has published that dies as soon as the coordinator is stopped.
fn prepare_survivor(scene: &Scene, _: &Bus) -> Result<Option<Process>, Violation> {
    let mut survivor = scene.start("hold", "beside the dead");
    survivor.expect("holding");
    let mut dying = scene.start("hold", "to die");
    dying.expect("holding");
    // Or it would present its arena, if it does not die soon enough.
    dying.signal(Signal::SIGSTOP);
    let coordinator = scene.server("coordinator");
    let stands = move || {
        let stat = fs::read_to_string(format!("/proc/{coordinator}/stat")).unwrap_or_default();
        !stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with(['R', 'S', 'D']))
    };
    thread::spawn(move || {
        while !stands() {
            thread::sleep(Duration::from_micros(100));
        }
        dying.kill();
    });
    Ok(Some(survivor))
}

fn prepare_newcomer(scene: &Scene, _: &Bus) -> Result<Option<Process>, Violation> {
    let mut process = scene.start("join", "all");
    process.expect("here");
    Ok(Some(process))
}

/// Role: joins the bus when it is told to. A process of its own: while a process lives, the coordinator keeps a place for
/// each Hello of its that was written down and not answered (ARCHITECTURE.md §9).
pub(crate) fn join() {
    crate::common::say("here");
    crate::common::hear();
    let bus = patiently_joined();
    crate::common::say("done");
    crate::common::hear();
    drop(bus);
}

/// Joining has no more time than a stepped coordinator may take; other requests have `DEADLINE`.
fn patiently_joined() -> Bus {
    let end = Instant::now() + DEADLINE;
    loop {
        match Bus::open_default() {
            Err(ConnectError::Timeout { .. }) if Instant::now() < end => {}
            joined => return joined.unwrap(),
        }
    }
}

/// Role: holds a publisher and a subscriber until it is killed; or a publisher that has written half a batch.
pub(crate) fn hold(bus: &Bus, what: &str) {
    if matches!(what, "beside the dead" | "to die") {
        let mut publisher = bus.publisher(subject_of_many()).unwrap();
        (0..if what == "to die" { 3 } else { 0 }).for_each(|_| assert!(publisher.publish(b"dead").is_ok()));
        crate::common::say("holding");
        crate::common::hear();
        return;
    }
    let mut publisher = bus.publisher(subject()).unwrap();
    let subscriber = (what == "all").then(|| bus.subscriber(subject()).start(Start::Oldest).open().unwrap());
    let held = publisher.publish(b"held").unwrap().get();
    if subscriber.is_none() {
        // The words of a batch are written from the last to the first, which is missing.
        (2..4).for_each(|ahead| mutant::write_ahead(held, ahead, b"never"));
    }
    crate::common::say("holding");
    crate::common::hear();
    drop((publisher, subscriber));
}

fn create(bus: &Bus) -> Result<(), OpenError> {
    bus.create(&subject()).map(drop)
}

fn open_publisher(bus: &Bus) -> Result<(), OpenError> {
    bus.publisher(subject()).map(drop)
}

fn open_publisher_of_many(bus: &Bus) -> Result<(), OpenError> {
    let mut reader = bus.subscriber(subject_of_many()).open()?;
    let mut first = bus.publisher(subject_of_many())?;
    let mut second = bus.publisher(subject_of_many())?;
    for publisher in [&mut first, &mut second] {
        publisher.publish(b"in its own arena").expect("nothing holds the ring");
        reader.recv_timeout(DEADLINE).expect("its arena is announced");
    }
    Ok(())
}

fn open_subscriber(bus: &Bus) -> Result<(), OpenError> {
    let mut subscriber = bus.subscriber(subject()).start(Start::Oldest).open()?;
    assert_eq!(&subscriber.recv_timeout(DEADLINE).expect("it is retained")[..], b"retained");
    Ok(())
}

fn remove(bus: &Bus) -> Result<(), Violation> {
    match bus.remove_topic(subject().name(), true) {
        // A removal that was finished by the successor is not there to be asked for again.
        Err(OpenError::Refused(Refusal::UnknownTopic { .. })) => Ok(()),
        other => text(other),
    }
}

/// A bus with traffic on it, and what it looks like while nothing is going on.
struct Stage<'a> {
    scene: &'a Scene,
    bus: Bus,
    publisher: Publisher<[u8]>,
    subscriber: Subscriber<[u8]>,
    next: u64,
    before: Picture,
}

/// What `show`, and the kernel, say.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Picture {
    topics: BTreeMap<String, (u64, usize, usize)>,
    keeper_fds: usize,
    coordinator_fds: usize,
}

impl<'a> Stage<'a> {
    fn new(scene: &'a Scene) -> Result<Stage<'a>, Violation> {
        let open = || -> Result<_, OpenError> {
            let bus = scene.open();
            let publisher = bus.publisher(traffic())?;
            let subscriber = bus.subscriber(traffic()).open()?;
            Ok((bus, publisher, subscriber))
        };
        let (bus, publisher, subscriber) = open().map_err(|error| error.to_string())?;
        // The first coordinator may hold what its successors do not, so the picture is taken of the second.
        let coordinator = Tracee::seize(scene.server("coordinator")).map_err(|error| error.to_string())?;
        coordinator.kill();
        let before = Picture::take(scene, &bus)?;
        Ok(Stage { scene, bus, publisher, subscriber, next: 0, before })
    }

    /// The survivors' traffic has no gap, also while nobody coordinates.
    fn exchange(&mut self) -> Result<(), Violation> {
        for _ in 0..20 {
            let sent = message(1, self.next, 40);
            let published = self.publisher.publish_timeout(&sent, DEADLINE).map_err(|error| error.to_string())?;
            let found = self.subscriber.recv_timeout(DEADLINE).map_err(|error| error.to_string())?;
            if (published.get(), found.sequence().get()) != (self.next, self.next) || found[..] != sent[..] {
                return Err(format!("message {} of the traffic came as {}", self.next, found.sequence().get()));
            }
            self.next += 1;
        }
        Ok(())
    }

    /// A newcomer can do everything.
    fn check_newcomer(&self) -> Result<(), Violation> {
        let topic = Topic::<[u8]>::new("newcomer").exclusive().messages(64).bytes(64 << 10);
        let work = || -> Result<(), Box<dyn std::error::Error>> {
            let bus = self.scene.options().open()?;
            let mut publisher = bus.publisher(topic.clone())?;
            let mut subscriber = bus.subscriber(topic.clone()).open()?;
            publisher.publish(b"new")?;
            subscriber.recv_timeout(DEADLINE)?;
            drop((publisher, subscriber));
            Ok(bus.remove_topic(topic.name(), false)?)
        };
        work().map_err(|error| format!("a newcomer: {error}"))
    }

    /// After the topics of the deed are removed everything is as it was.
    fn check_nothing_leaked(&self) -> Result<(), Violation> {
        for topic in [subject(), subject_of_many(), group_deeds::results()] {
            match self.bus.remove_topic(topic.name(), true) {
                Ok(()) | Err(OpenError::Refused(Refusal::UnknownTopic { .. })) => {}
                Err(error) => return Err(format!("removing the topic of the deed: {error}")),
            }
        }
        let end = Instant::now() + DEADLINE;
        loop {
            let picture = Picture::take(self.scene, &self.bus)?;
            if picture == self.before {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(format!("something leaked: {picture:?}, before it was {:?}", self.before));
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Picture {
    fn take(scene: &Scene, bus: &Bus) -> Result<Picture, Violation> {
        let topics = bus.topics().map_err(|error| format!("listing the topics: {error}"))?;
        let view = |topic: shmbus::TopicStatus| {
            (topic.name, (topic.memory_bytes, topic.publishers.len(), topic.subscribers.len()))
        };
        let fds = |role: &str| fs::read_dir(format!("/proc/{}/fd", scene.server(role))).map_or(0, Iterator::count);
        let topics = topics.into_iter().map(view).collect();
        Ok(Picture { topics, keeper_fds: fds("keeper"), coordinator_fds: fds("coordinator") })
    }
}

/// The coordinator stopped, and the deed asked for.
struct Begun {
    tracee: Tracee,
    outcome: Receiver<Result<(), Violation>>,
}

/// Which coordinator dies over the deed.
#[derive(Clone, Debug)]
enum Victim {
    /// The one that is asked.
    Asked,
    /// The one after it. The first dies at this point of the deed, or before all of it.
    Successor(Option<Point>),
    /// One that adopts the bus after coordinator and keeper have died, from its start on. The one before it had begun to.
    Adopter,
}

fn begin(stage: &Stage<'_>, deed: &Deed, process: Option<Process>, victim: &Victim) -> io::Result<Begun> {
    let (done, outcome) = channel();
    let (bus, act) = (stage.bus.clone(), deed.act);
    let ask = move |process| thread::spawn(move || done.send(act(&bus, process)));
    let tracee = match victim {
        Victim::Asked => {
            let tracee = Tracee::seize(stage.scene.server("coordinator"))?;
            ask(process);
            tracee
        }
        Victim::Successor(first) => {
            let mut asked = Tracee::seize(stage.scene.server("coordinator"))?;
            let keeper = Tracee::seize_parent(stage.scene.server("keeper"))?;
            ask(process);
            if let Some(point) = first {
                // Wherever it is when its time is up, it dies.
                point.reach(&mut asked, false)?;
            }
            asked.kill();
            keeper.next_child(START)?
        }
        Victim::Adopter => {
            let tracee = begin_adoption(stage.scene, process.as_ref())?;
            ask(process);
            tracee
        }
    };
    Ok(Begun { tracee, outcome })
}

/// Kills coordinator and keeper, and the one who adopts the bus while it waits for `stopped`; the next one stands at its start.
fn begin_adoption(scene: &Scene, stopped: Option<&Process>) -> io::Result<Tracee> {
    stopped.into_iter().for_each(|process| process.signal(Signal::SIGSTOP));
    let old = [scene.server("coordinator"), scene.server("keeper")];
    // Each of them would start the other again.
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        old.iter().try_for_each(|pid| kill(*pid, signal))?;
    }
    let mut first = None;
    await_that("somebody adopts the bus", || {
        first = scene.servers(Some("coordinator")).into_iter().find(|pid| !old.contains(pid));
        first.is_some()
    });
    let first = first.ok_or_else(|| io::Error::other("nobody adopts the bus"))?;
    let keeper = Tracee::seize_parent(parent_of(first)?)?;
    kill(first, Signal::SIGKILL)?;
    keeper.next_child(START)
}

fn parent_of(pid: Pid) -> io::Result<Pid> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
    parent.map(Pid::from_raw).ok_or_else(|| io::Error::other(format!("process {pid} has no parent: {stat}")))
}

/// Where to kill.
#[derive(Clone, Debug)]
struct Point {
    /// After so many system calls of a start, while no segment is mapped and so nothing else can be noticed.
    calls: u64,
    /// Then at this visit of a place; `None`: at the next call.
    place: Option<(Place, u64)>,
    effect: Effect,
}

impl Point {
    /// Whether it came there; `stepped`, as slowly as when the places were counted, or running.
    fn reach(&self, tracee: &mut Tracee, stepped: bool) -> io::Result<bool> {
        for _ in 0..self.calls {
            // In, and out again.
            if !(tracee.run_to_call(START)? && tracee.run_to_call(START)?) {
                return Ok(false);
            }
        }
        match &self.place {
            Some((place, visit)) if stepped => tracee.step_to(place, *visit, STEPPED_PATIENCE),
            Some((place, visit)) => tracee.run_to(place, *visit, PATIENCE),
            None => tracee.run_to_call(START),
        }
    }
}

/// Every place of the deed where a kill could make a difference: with the how-manieth visit it is.
fn count(deed: &Deed, victim: &Victim) -> io::Result<(usize, Vec<Point>)> {
    let scene = Scene::new("count");
    let stage = Stage::new(&scene).map_err(io::Error::other)?;
    let process = (deed.prepare)(&scene, &stage.bus).map_err(io::Error::other)?;
    let Begun { mut tracee, outcome } = begin(&stage, deed, process, victim)?;
    let (mut lens, mut points, mut visits, mut instructions) = (Lens::new(), Vec::new(), HashMap::new(), 0);
    let (mut last, mut done, mut calls) = (0, false, 0);
    while !matches!(victim, Victim::Asked) && !lens.has_segments(&tracee) {
        points.push(Point { calls, place: None, effect: Effect::SystemCall });
        if !(tracee.run_to_call(START)? && tracee.run_to_call(START)?) {
            return Err(io::Error::other("the successor did not come to map anything"));
        }
        lens.forget_segments();
        calls += 1;
    }
    loop {
        let registers = tracee.registers()?;
        let effect = lens.look(&tracee, &registers)?;
        let notable =
            matches!(effect, Effect::Write | Effect::SystemCall) || (covers_reads() && effect == Effect::Read);
        // A string instruction stays where it is; a breakpoint there is met once.
        if registers.rip != last {
            let visit = visits.entry(registers.rip).or_insert(0);
            *visit += 1;
            if notable && let Some(place) = tracee.place_of(registers.rip) {
                points.push(Point { calls, place: Some((place, *visit)), effect });
            }
        }
        last = registers.rip;
        instructions += 1;
        let mut stop = match effect {
            Effect::SystemCall => tracee.step_patiently(IDLE)?,
            _ => Some(tracee.step()?),
        };
        // It sleeps: the deed is done, or the client busy with its part.
        while stop.is_none() && !done {
            done = match outcome.try_recv() {
                Ok(_) => true,
                Err(TryRecvError::Empty) => false,
                Err(TryRecvError::Disconnected) => {
                    return Err(io::Error::other("the deed failed while it was counted"));
                }
            };
            stop = tracee.step_on(IDLE)?;
        }
        match stop {
            Some(Stop::Trap) => {}
            Some(stop) => return Err(io::Error::other(format!("the coordinator met {stop:?}"))),
            None => return Ok((instructions, points)),
        }
        if instructions > MAX_STEPS {
            return Err(io::Error::other(format!("the deed did not end in {instructions} instructions")));
        }
    }
}

/// Kills the coordinator at each place of a deed, or at a sample of them.
pub(crate) fn run(deed: &Deed, seed: u64) -> io::Result<Report> {
    run_as(deed, &format!("coordinator: {}", deed.name), &Victim::Asked, seed)
}

/// Kills the coordinator over a deed, before or in the midst of it, and its successor at each place from its start on, or at a
/// sample of all that.
pub(crate) fn run_successor(deed: &Deed, seed: u64) -> io::Result<Vec<Report>> {
    let (_, places) = count(deed, &Victim::Asked)?;
    let mut random = Random::new(seed);
    let firsts: Vec<usize> = match is_long() {
        true => (0..FIRST_PLACES).map(|n| n * places.len() / FIRST_PLACES).collect(),
        false => vec![random.below(places.len() as u64) as usize],
    };
    let run = |first: usize| {
        let victim = Victim::Successor((first > 0).then(|| places[first].clone()));
        run_as(deed, &format!("successor, {first}: {}", deed.name), &victim, seed)
    };
    firsts.into_iter().map(run).collect()
}

/// Kills whoever adopts a bus of which coordinator and keeper have died, from its start on; and where a publisher has died with them
/// whose arena nobody else has.
pub(crate) fn run_adopter(seed: u64) -> io::Result<[Report; 2]> {
    let prepare = |scene: &Scene, bus: &Bus| prepare_participant(scene, bus, "all");
    let all = Deed { name: ADOPTION, prepare, act: find_adopted };
    let left = Deed { name: ADOPTION, prepare: prepare_survivor, act: find_without_the_dead };
    let run = |name: &str, deed: &Deed| run_as(deed, name, &Victim::Adopter, seed);
    Ok([run(ADOPTION, &all)?, run("adopt what the dead left", &left)?])
}

fn run_as(deed: &Deed, name: &str, victim: &Victim, seed: u64) -> io::Result<Report> {
    let (instructions, mut points) = count(deed, victim)?;
    let of = |wanted: Effect| points.iter().filter(|point| point.effect == wanted).count();
    let mut report = Report {
        name: name.to_owned(),
        instructions,
        writes: of(Effect::Write),
        system_calls: of(Effect::SystemCall),
        ..Report::default()
    };
    let mut random = Random::new(seed);
    if let Victim::Successor(Some(_)) = victim {
        // How it comes to its first segment, and what it only reads, was covered where the first one dies before the deed.
        points.retain(|point| point.place.is_some() && point.effect != Effect::Read);
    }
    let short_kills = if let Victim::Asked = victim { SHORT_KILLS } else { SHORT_DOUBLE_KILLS };
    while !is_long() && points.len() > short_kills {
        points.remove(random.below(points.len() as u64) as usize);
    }
    let part = points.len().div_ceil(SIDE_BY_SIDE).max(1);
    // Most of the time they sleep.
    let reports = thread::scope(|scope| -> io::Result<Vec<Report>> {
        let parts = points.chunks(part).map(|points| scope.spawn(|| kill_at_each(deed, victim, points)));
        let running: Vec<_> = parts.collect();
        running.into_iter().map(|part| part.join().expect("it reports violations instead of panicking")).collect()
    })?;
    for part in reports {
        report.kills += part.kills;
        report.missed += part.missed;
        report.violations.extend(part.violations);
    }
    Ok(report)
}

/// Kills one coordinator at each of these places, or several until one comes there.
fn kill_at_each(deed: &Deed, victim: &Victim, points: &[Point]) -> io::Result<Report> {
    let kills_a_bus = if let Victim::Asked = victim { KILLS_A_BUS } else { DOUBLE_KILLS_A_BUS };
    let (mut points, mut tries, mut report) = (points.iter().peekable(), 0, Report::default());
    while points.peek().is_some() && report.violations.len() < MAX_VIOLATIONS {
        let scene = Scene::new("coordinator");
        let mut stage = Stage::new(&scene).map_err(io::Error::other)?;
        for _ in 0..kills_a_bus {
            let Some(point) = points.peek() else { break };
            report.kills += 1;
            tries += 1;
            let (reached, survived) = kill_at(&mut stage, deed, victim, point, tries % 2 == 0)?;
            if let Err(violation) = &survived {
                report.violations.push(format!("killed before {point:?}: {violation}"));
            }
            if reached || tries == most_tries() || survived.is_err() {
                report.missed += usize::from(!reached);
                points.next();
                tries = 0;
            }
            if survived.is_err() {
                break;
            }
        }
    }
    Ok(report)
}

/// Whether the place was reached, and whether the kill was survived.
fn kill_at(
    stage: &mut Stage<'_>,
    deed: &Deed,
    victim: &Victim,
    point: &Point,
    stepped: bool,
) -> io::Result<(bool, Result<(), Violation>)> {
    let process = match (deed.prepare)(stage.scene, &stage.bus) {
        Ok(process) => process,
        Err(violation) => return Ok((false, Err(violation))),
    };
    let Begun { mut tracee, outcome } = begin(stage, deed, process, victim)?;
    let reached = point.reach(&mut tracee, stepped)?;
    let pid = tracee.pid();
    tracee.kill();
    Ok((reached, check(stage, pid, &outcome)))
}

fn check(stage: &mut Stage<'_>, dead: Pid, outcome: &Receiver<Result<(), Violation>>) -> Result<(), Violation> {
    stage.exchange()?;
    match outcome.recv_timeout(DEADLINE) {
        Ok(outcome) => outcome?,
        Err(error) => return Err(format!("the client's request did not end well: {error}")),
    }
    if stage.scene.server("coordinator") == dead {
        return Err("the dead coordinator is still there".to_owned());
    }
    stage.check_newcomer()?;
    stage.exchange()?;
    stage.check_nothing_leaked()
}
