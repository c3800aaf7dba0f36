//! The demo's processes: a publisher and a subscriber, and how the demo talks to them (lines on their pipes).

use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure};
use shmbus::Topic;

use crate::sandbox::{Minder, Sandbox};
use crate::{Ended, Globals, output, signals};

/// What the demo publishes: which publisher, and which of its messages.
pub(super) type Numbered = [u64; 2];

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    role: Role,
}

#[derive(clap::Subcommand)]
enum Role {
    /// Publishes (index, 0), (index, 1), ...
    Publish {
        topic: String,
        index: u64,
        /// How many; 0: until SIGTERM
        count: u64,
    },
    /// Receives so many and prints the digest of what came in which order
    Subscribe { topic: String, count: u64 },
}

pub(super) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    signals::install(Duration::from_secs(1), Box::new(String::new))?;
    match args.role {
        Role::Publish { topic, index, count } => publish(globals, topic, index, count),
        Role::Subscribe { topic, count } => subscribe(globals, topic, count),
    }
}

fn publish(globals: &Globals, topic: String, index: u64, count: u64) -> anyhow::Result<Ended> {
    let mut publisher = globals.open_bus()?.publisher(Topic::<Numbered>::named(topic))?;
    output::line("ready")?;
    std::io::stdin().read_exact(&mut [0])?; // all publishers start together
    let mut number = 0;
    while (count == 0 || number < count) && signals::caught().is_none() {
        publisher.publish(&[index, number])?;
        number += 1;
    }
    output::line(format_args!("published {number}"))?;
    Ok(Ended::Well)
}

fn subscribe(globals: &Globals, topic: String, count: u64) -> anyhow::Result<Ended> {
    let mut subscriber = globals.open_bus()?.subscriber(Topic::<Numbered>::named(topic)).open()?;
    output::line("ready")?;
    let mut digest = Digest::default();
    let mut tally = Tally::default();
    for _ in 0..count {
        let [publisher, number] = *subscriber.recv()?;
        tally.add(publisher, number)?;
        digest.word(publisher);
        digest.word(number);
    }
    output::line(format_args!("digest {:016x}", digest.value()))?;
    Ok(Ended::Well)
}

/// What has come from each publisher: nothing missing, nothing twice, in its order.
#[derive(Default)]
pub(super) struct Tally {
    next: Vec<u64>,
}

impl Tally {
    pub(super) fn add(&mut self, publisher: u64, number: u64) -> anyhow::Result<()> {
        ensure!(publisher < 64, "a message from publisher {publisher}, which does not exist");
        let publisher = publisher as usize;
        if self.next.len() <= publisher {
            self.next.resize(publisher + 1, 0);
        }
        let expected = self.next[publisher];
        ensure!(number == expected, "publisher {publisher}: message {number} came where {expected} was due");
        self.next[publisher] += 1;
        Ok(())
    }

    /// How many came from this publisher.
    pub(super) fn count(&self, publisher: usize) -> u64 {
        self.next.get(publisher).copied().unwrap_or(0)
    }
}

/// FNV-1a, 64 bits, over 8-byte words: enough to compare two runs of bytes of which nobody is an enemy.
pub(super) struct Digest(u64);

impl Default for Digest {
    fn default() -> Self {
        Digest(0xcbf2_9ce4_8422_2325)
    }
}

impl Digest {
    pub(super) fn word(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    }

    /// The length must be a multiple of 8.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        bytes.as_chunks::<8>().0.iter().for_each(|word| self.word(u64::from_le_bytes(*word)));
    }

    pub(super) fn value(&self) -> u64 {
        self.0
    }
}

/// A worker as the demo sees it.
pub(super) struct Worker {
    pub(super) process: Minder,
    lines: Receiver<String>,
}

impl Worker {
    /// Starts one and waits until it is attached to its topic.
    pub(super) fn start(sandbox: &Sandbox, arguments: &[&str]) -> anyhow::Result<Worker> {
        let arguments = ["demo", "worker"].iter().chain(arguments);
        let mut child = sandbox.command(arguments)?.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().ok_or_else(|| anyhow!("a worker without standard output"))?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let worker = Worker { process: Minder(child), lines };
        worker.expect("ready", Instant::now() + Duration::from_secs(10))?;
        Ok(worker)
    }

    /// Lets a publisher begin.
    pub(super) fn go(&mut self) -> anyhow::Result<()> {
        let stdin = self.process.0.stdin.as_mut().ok_or_else(|| anyhow!("a worker without standard input"))?;
        Ok(stdin.write_all(b"\n")?)
    }

    /// The worker's next line, which must begin with `word`; what follows the word.
    pub(super) fn expect(&self, word: &str, deadline: Instant) -> anyhow::Result<String> {
        loop {
            check_signals()?;
            match self.lines.recv_timeout(Duration::from_millis(50)) {
                Ok(line) => match line.strip_prefix(word) {
                    Some(rest) => return Ok(rest.trim().to_owned()),
                    None => bail!("process {} said {line:?} instead of {word:?}", self.process.pid()),
                },
                Err(RecvTimeoutError::Disconnected) => bail!("process {} ended early", self.process.pid()),
                Err(RecvTimeoutError::Timeout) => {
                    let pid = self.process.pid();
                    ensure!(Instant::now() < deadline, "process {pid} did not come to {word:?} in time");
                }
            }
        }
    }
}

/// Fails after Ctrl-C, so that everything is tidied up on the way out.
pub(super) fn check_signals() -> anyhow::Result<()> {
    ensure!(signals::caught().is_none(), "ended by a signal");
    Ok(())
}
