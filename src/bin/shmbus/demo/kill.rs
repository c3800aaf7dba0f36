//! Step 3: SIGKILL for a publisher and for the coordinator, under traffic.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use serde::Serialize;
use shmbus::{Bus, RecvError, Subscriber, Topic};

use super::screen::Screen;
use super::worker::{Numbered, Tally, Worker, check_signals};
use crate::output::grouped;
use crate::sandbox::{Sandbox, Server, serving};

const TOPIC: &str = "demo.kill";

/// How long traffic is watched before and after each kill.
const WATCH: Duration = Duration::from_millis(700);

/// How long the bus may take to be whole again.
const MEND_LIMIT: Duration = Duration::from_secs(10);

#[derive(Serialize)]
struct Found {
    publisher_killed: Pause,
    coordinator_killed: Pause,
    newcomer_joined_ms: u64,
    messages: u64,
}

/// Traffic around a kill.
#[derive(Serialize)]
struct Pause {
    messages_per_s_before: u64,
    messages_per_s_after: u64,
    longest_pause_ms: f64,
}

pub(super) fn run(screen: &Screen, sandbox: &Sandbox, bus: &Bus) -> anyhow::Result<()> {
    screen.heading(3, "kill -9 under traffic: a publisher, then the coordinator")?;
    let topic = Topic::<Numbered>::named(TOPIC);
    bus.create_topic(TOPIC, &topic.options(), false)?;
    let mut traffic = Traffic { subscriber: bus.subscriber(topic).open()?, tally: Tally::default() };
    let mut victim = Worker::start(sandbox, &["publish", TOPIC, "0", "0"])?;
    let mut survivor = Worker::start(sandbox, &["publish", TOPIC, "1", "0"])?;
    victim.go()?;
    survivor.go()?;

    let publisher_killed = traffic.around(|| Ok(victim.process.0.kill()?))?;
    say(screen, &format!("publisher (process {})", victim.process.pid()), &publisher_killed)?;
    let coordinator = coordinator_of(sandbox)?;
    let coordinator_killed = traffic.around(|| Ok(kill(coordinator.pid, Signal::SIGKILL)?))?;
    say(screen, &format!("coordinator (process {})", coordinator.pid), &coordinator_killed)?;

    let newcomer_joined_ms = traffic.newcomer(sandbox)?;
    screen.holds(&format!("the coordinator is back: a new publisher process joined within {newcomer_joined_ms} ms"))?;
    kill(survivor.process.pid(), Signal::SIGTERM)?;
    let published: u64 = traffic.while_waiting(|| survivor.expect("published", Instant::now()))?.parse()?;
    traffic.drain()?;
    let (dead, alive) = (traffic.tally.count(0), traffic.tally.count(1));
    ensure!(alive == published, "the survivor published {published} messages, {alive} arrived");
    screen.holds(&format!("of the survivor's {} messages every one arrived, in order; of the", grouped(published)))?;
    screen.line(&format!("     killed publisher's the first {}, without a gap, and nothing half", grouped(dead)))?;
    let found = Found { publisher_killed, coordinator_killed, newcomer_joined_ms, messages: dead + alive };
    Ok(screen.passed("kill", &found)?)
}

fn say(screen: &Screen, victim: &str, pause: &Pause) -> std::io::Result<()> {
    let (before, after) = (grouped(pause.messages_per_s_before), grouped(pause.messages_per_s_after));
    let longest = pause.longest_pause_ms;
    screen.holds(&format!("{victim} killed: {before} messages/s before, {after} after, longest pause {longest:.1} ms"))
}

/// The coordinator among the processes that serve the bus: its arguments say so.
fn coordinator_of(sandbox: &Sandbox) -> anyhow::Result<Server> {
    let servers = serving(sandbox.directory());
    let coordinator = servers.iter().find(|server| server.command_line.contains("--role coordinator"));
    // Where the coordinator has no role of its own, the one process that serves is it.
    coordinator.or(servers.first()).cloned().context("no coordinator process was found")
}

/// This process is the subscriber: it sees every message, checks it, and notes the longest silence.
struct Traffic {
    subscriber: Subscriber<Numbered>,
    tally: Tally,
}

impl Traffic {
    /// Receives for a while. How many came, and the longest silence.
    fn watch(&mut self, time: Duration) -> anyhow::Result<(u64, Duration)> {
        let started = Instant::now();
        let (mut count, mut longest, mut last) = (0, Duration::ZERO, started);
        while last.duration_since(started) < time {
            let came = self.receive(Duration::from_millis(20))?;
            let now = Instant::now();
            longest = longest.max(now.duration_since(last));
            last = now;
            count += u64::from(came);
            check_signals()?;
        }
        Ok((count, longest))
    }

    fn receive(&mut self, timeout: Duration) -> anyhow::Result<bool> {
        match self.subscriber.recv_timeout(timeout) {
            Ok(message) => {
                let [publisher, number] = *message;
                self.tally.add(publisher, number)?;
                Ok(true)
            }
            Err(RecvError::TimedOut) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Traffic before and after the deed.
    fn around(&mut self, deed: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Pause> {
        let (before, _) = self.watch(WATCH)?;
        ensure!(before > 0, "there was no traffic before the kill");
        deed()?;
        let (after, longest) = self.watch(WATCH)?;
        ensure!(after > 0, "traffic stopped after the kill");
        let per_s = |count: u64| (count as f64 / WATCH.as_secs_f64()) as u64;
        let longest_pause_ms = longest.as_secs_f64() * 1e3;
        Ok(Pause { messages_per_s_before: per_s(before), messages_per_s_after: per_s(after), longest_pause_ms })
    }

    /// Keeps receiving (or the publishers would wait for us) until `done` no longer fails.
    fn while_waiting<T>(&mut self, done: impl Fn() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let deadline = Instant::now() + MEND_LIMIT;
        loop {
            self.watch(Duration::from_millis(5))?;
            match done() {
                Err(_) if Instant::now() < deadline => continue,
                result => return result,
            }
        }
    }

    /// A newcomer needs the coordinator. How long until one had joined, its process's start included; it publishes too.
    fn newcomer(&mut self, sandbox: &Sandbox) -> anyhow::Result<u64> {
        let started = Instant::now();
        let mut newcomer = Worker::start(sandbox, &["publish", TOPIC, "2", "1000"])?;
        let joined = started.elapsed();
        newcomer.go()?;
        self.while_waiting(|| newcomer.expect("published", Instant::now()))?;
        self.drain_until(2, 1000)?;
        Ok(joined.as_millis() as u64)
    }

    fn drain_until(&mut self, publisher: usize, count: u64) -> anyhow::Result<()> {
        let deadline = Instant::now() + MEND_LIMIT;
        while self.tally.count(publisher) < count {
            self.watch(Duration::from_millis(1))?;
            ensure!(Instant::now() < deadline, "publisher {publisher}'s messages did not arrive");
        }
        Ok(())
    }

    /// Everything that is still in the ring.
    fn drain(&mut self) -> anyhow::Result<()> {
        while self.receive(Duration::from_millis(100))? {}
        Ok(())
    }
}
