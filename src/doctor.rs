//! What is wrong on this machine, and how to mend it: what `shmbus doctor` prints.

use std::fmt;
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::client::Bus;
use crate::coordinator::directory::{Place, in_use};
use crate::coordinator::protocol::{BlockedTopic, BlockingGroup, BusReport, LeaseStatus, TopicStatus};
use crate::error::{ConnectError, OpenError};
use crate::os::{memory_size, probe, socket};

/// The oldest kernel that has everything shmbus cannot do without.
const OLDEST_KERNEL: (u32, u32) = (5, 10);

/// With fewer descriptors a coordinator serves less than a hundred topics.
const FEW_DESCRIPTORS: u64 = 1024;

/// With less memory available the default budget does not hold a few default topics (16 MiB each).
const LITTLE_MEMORY: u64 = 256 << 20;

/// A reader that has not moved for so long while its topic is full holds it up.
const WATCH: Duration = Duration::from_millis(200);

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something does not work.
    Error,
    /// Something waits, or soon will.
    Warning,
    /// Nothing is wrong, and yet it is good to know.
    Note,
}

/// One thing found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is about, as "bus default" or "kernel".
    pub subject: String,
    /// What was found.
    pub finding: String,
    /// What to do about it.
    pub mend: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Note => "note",
        };
        write!(f, "{severity}: {}: {}; {}", self.subject, self.finding, self.mend)
    }
}

/// Looks at the machine, the socket directory and the buses in it (`bus`: at this one only). Starts nothing and changes
/// nothing.
pub fn examine(bus: Option<&str>, directory: Option<&Path>) -> Vec<Finding> {
    let mut findings = Findings(Vec::new());
    findings.machine();
    findings.memory();
    match in_use(directory) {
        Ok(directory) => findings.directory(&directory, bus),
        Err(error) => findings.refused("socket directory", &error),
    }
    findings.0
}

struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, severity: Severity, subject: &str, finding: impl Into<String>, mend: impl Into<String>) {
        self.0.push(Finding { severity, subject: subject.to_owned(), finding: finding.into(), mend: mend.into() });
    }

    fn refused(&mut self, subject: &str, error: &ConnectError) {
        match error {
            ConnectError::Refused { path, problem, mend } => {
                self.add(Severity::Error, subject, format!("{} {problem}", path.display()), *mend);
            }
            other => self.add(Severity::Error, subject, other.to_string(), "see what the error names"),
        }
    }

    /// The kernel and this user's limits.
    fn machine(&mut self) {
        let (major, minor) = probe::kernel_version().unwrap_or((0, 0));
        if (major, minor) < OLDEST_KERNEL {
            let mend = "run Linux 5.10 or newer";
            self.add(Severity::Error, "kernel", format!("Linux {major}.{minor} is too old"), mend);
        }
        if !probe::has_pidfd() {
            let mend = "run Linux 5.3 or newer, or allow pidfd_open in the sandbox";
            self.add(Severity::Error, "kernel", "no pidfd_open: nobody's death can be proven", mend);
        }
        let features = [
            (probe::has_peer_pidfd(), "SO_PEERPIDFD", "processes are watched by their number", "6.5"),
            (probe::has_membarrier(), "membarrier GLOBAL_EXPEDITED", "sleepers wake up every millisecond", "4.16"),
            (probe::has_noexec_memfd(), "MFD_NOEXEC_SEAL", "shared memory could be made executable", "6.3"),
            (probe::has_futex_waitv(), "futex_waitv", "waiting on many topics takes more system calls", "5.16"),
        ];
        for (_, name, consequence, since) in features.into_iter().filter(|(present, ..)| !present) {
            let mend = format!("Linux {since} has it, unless a sandbox forbids it");
            self.add(Severity::Note, "kernel", format!("no {name}: {consequence}"), mend);
        }
        if let Some(limit) = probe::descriptor_limit().filter(|limit| *limit < FEW_DESCRIPTORS) {
            let finding = format!("at most {limit} descriptors a process; each topic takes three and more");
            self.add(Severity::Warning, "limits", finding, "raise the hard limit (`ulimit -Hn`, LimitNOFILE=)");
        }
    }

    fn memory(&mut self) {
        let available = memory_size::available_bytes();
        if available < LITTLE_MEMORY {
            let finding = format!("{} MiB are available to the machine or this cgroup", available >> 20);
            let mend = "free some, raise the cgroup's memory.max, or create topics with fewer --bytes";
            self.add(Severity::Warning, "memory", finding, mend);
        }
        let setting = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
        if let Some(chosen) = probe::chosen(setting).filter(|word| word == "always" || word == "force") {
            let finding = format!("{setting} is {chosen}: small segments take 2 MiB, which no budget counts");
            self.add(Severity::Warning, "memory", finding, format!("echo advise > {setting}"));
        }
    }

    fn directory(&mut self, directory: &Path, bus: Option<&str>) {
        let known = match fs::exists(directory) {
            Ok(false) => Ok(Vec::new()),
            _ => Place::buses_in(directory),
        };
        match (known, bus) {
            (Err(error), _) => {
                let finding = format!("{} cannot be read: {error}", directory.display());
                self.add(Severity::Error, "socket directory", finding, "make it yours, or set SHMBUS_DIR");
            }
            (Ok(known), bus) => {
                for name in known.iter().filter(|name| bus.is_none_or(|bus| bus == name.as_str())) {
                    match Place::find(name, Some(directory)) {
                        Ok(place) => self.bus(&place),
                        Err(error) => self.refused(&format!("bus {name}"), &error),
                    }
                }
            }
        }
    }

    /// One bus, of which at least a name is there.
    fn bus(&mut self, place: &Place) {
        let subject = format!("bus {}", place.bus);
        let holders = probe::openers(place.lock_path());
        if holders.is_empty() && socket::connect(place.socket()).is_err() {
            let names: Vec<_> = place.names_present().iter().map(|path| path.display().to_string()).collect();
            let finding = format!("nobody serves it, and {} is left", names.join(" and "));
            return self.add(
                Severity::Warning,
                &subject,
                finding,
                "the next program takes up what is left of it, or replaces it; or delete it",
            );
        }
        let stopped: Vec<u32> = holders.into_iter().filter(|pid| probe::state(*pid) == Some('T')).collect();
        for pid in &stopped {
            let finding = format!("process {pid}, which serves it, is stopped: joins and repair wait");
            self.add(Severity::Error, &subject, finding, format!("kill -CONT {pid}"));
        }
        // The coordinator may be among them; asking it would take as long as our patience.
        if stopped.is_empty() {
            self.ask(place, &subject);
        }
    }

    fn ask(&mut self, place: &Place, subject: &str) {
        let ask = || {
            let options = Bus::options().name(&place.bus).directory(place.directory().to_owned());
            let bus = options.spawn(false).open()?;
            let before = bus.report()?;
            if !before.blocked.is_empty() {
                std::thread::sleep(WATCH);
            }
            let now = bus.report()?;
            // Counting leases is work for the coordinator; nobody asks unless somebody is stopped.
            let topics =
                if now.participants.iter().any(|process| is_stopped(process.pid)) { bus.topics()? } else { Vec::new() };
            Ok::<_, OpenError>((before, now, topics))
        };
        match ask() {
            Ok((before, now, topics)) => {
                self.served(&now, subject);
                self.participants(&now, subject);
                topics.iter().for_each(|topic| self.stopped_consumers(topic));
                let stuck = now.blocked.iter().filter(|topic| before.blocked.iter().any(|b| same_hold(b, topic)));
                stuck.for_each(|topic| self.blocked(topic));
            }
            Err(error) => {
                let mend = "look at what it says in the journal or terminal; if it hangs, kill it: another takes over";
                self.add(Severity::Error, subject, error.to_string(), mend);
            }
        }
    }

    fn served(&mut self, report: &BusReport, subject: &str) {
        let (used, budget) = (report.most_reserved_bytes, report.budget_bytes);
        if used >= budget / 10 * 9 {
            let finding = format!("{} of a budget of {} MiB are reserved", used >> 20, budget >> 20);
            let mend = "remove topics with `shmbus rm`, or serve it with a larger SHMBUS_BUDGET";
            self.add(Severity::Warning, subject, finding, mend);
        }
        let keeper = report.keeper_pid.filter(|pid| !matches!(probe::state(*pid), None | Some('Z' | 'X')));
        if keeper.is_none() {
            let (severity, finding, mend) = if is_program(report.coordinator_pid) {
                (Severity::Warning, "it has no keeper just now", "it starts one by itself; look again in a second")
            } else {
                let mend = "install the shmbus program or set SHMBUS_BIN, for a bus that outlives its programs";
                (Severity::Note, "a program hosts it on a thread, and ends it with itself", mend)
            };
            self.add(severity, subject, finding, mend);
        }
    }

    fn participants(&mut self, report: &BusReport, subject: &str) {
        for process in report.participants.iter().filter(|process| process.pid != 0) {
            let (pid, handles) = (process.pid, process.handles);
            match probe::state(pid) {
                Some('T') => {
                    let finding = format!("process {pid} is stopped and holds {handles} places");
                    self.add(Severity::Warning, subject, finding, format!("kill -CONT {pid}, or end it"));
                }
                None | Some('Z' | 'X') => {
                    let finding = format!("process {pid} is dead and yet holds {handles} places");
                    let mend = "look again in a second; if it stays, kill the coordinator: its successor repairs it";
                    self.add(Severity::Warning, subject, finding, mend);
                }
                Some(_) => {}
            }
        }
    }

    /// Consumers that do nothing about what they have leased.
    fn stopped_consumers(&mut self, topic: &TopicStatus) {
        for group in &topic.groups {
            let holding = group.consumers.iter().filter(|consumer| consumer.in_flight > 0 && is_stopped(consumer.pid));
            for consumer in holding {
                let (number, pid, leases) = (consumer.consumer, consumer.pid, consumer.in_flight);
                let finding = format!(
                    "consumer {number} of group {} (process {pid}) is stopped and holds {leases} leases",
                    group.name
                );
                let mend = format!("kill -CONT {pid}, or end it: its leases pass on at once");
                self.add(Severity::Warning, &format!("topic {}", topic.name), finding, mend);
            }
        }
    }

    fn blocked(&mut self, topic: &BlockedTopic) {
        let BlockedTopic { topic: name, cursor, pid, sequence, lag, group, .. } = topic;
        let (holder, mend) = match group {
            Some(group) => group_hold(name, group, *sequence),
            None => (
                format!("subscriber {cursor} {}", process(*pid)),
                format!("continue or end process {pid}, or let it open the topic as droppable"),
            ),
        };
        let finding = match group {
            Some(group) => format!("is full: group {} is {lag} messages behind: {holder}", group.name),
            None => format!("is full: {holder} is {lag} messages behind"),
        };
        self.add(Severity::Warning, &format!("topic {name}"), finding, mend);
    }
}

/// Who keeps a group from going on at its floor, and what helps.
fn group_hold(topic: &str, group: &BlockingGroup, floor: u64) -> (String, String) {
    match &group.oldest_lease {
        Some(LeaseStatus { sequence, consumer, pid, attempt, .. }) => (
            format!(
                "consumer {consumer} {} holds the oldest lease, attempt {attempt} at sequence {sequence}",
                process(*pid)
            ),
            format!("continue or end process {pid}"),
        ),
        None if group.moving > 0 => (
            format!("{} messages wait for its dead-letter topic, which is full or takes none like them", group.moving),
            "read or purge the dead-letter topic; if it has room, remove it, so that it is created again to fit"
                .to_owned(),
        ),
        None if group.consumers == 0 => (
            format!("it has no consumer, and holds everything from sequence {floor} on"),
            format!("start a consumer, or remove it with `shmbus group rm {topic} {}`", group.name),
        ),
        None => (
            format!("none of its {} consumers has taken sequence {floor}", group.consumers),
            format!("look at them with `shmbus show {topic}`: they are busy, at their limit, or wait out a back-off"),
        ),
    }
}

/// A process in a sentence.
fn process(pid: u32) -> String {
    let stopped = if is_stopped(pid) { ", which is stopped," } else { "" };
    format!("(process {pid}){stopped}")
}

/// Whether the process with this number is stopped (SIGSTOP, Ctrl-Z): it keeps what it holds, and does nothing with it. True at
/// some moment during the call; `false` where nobody can tell.
pub fn is_stopped(pid: u32) -> bool {
    pid != 0 && probe::state(pid) == Some('T')
}

/// Whether the same reader stands where it stood.
fn same_hold(before: &BlockedTopic, now: &BlockedTopic) -> bool {
    (&before.topic, before.cursor, before.sequence) == (&now.topic, now.cursor, now.sequence)
}

/// Whether this is a coordinator of its own and not a program that hosts one.
fn is_program(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == "shmbus-coord")
}
