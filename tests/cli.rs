//! The command line with real processes: what it is for, and bad input of every kind.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// No test waits longer than this for anything.
const LIMIT: Duration = Duration::from_secs(60);

/// A bus of the test's own; stopped and removed at the end, also when the test fails.
struct TestBus {
    directory: TempDir,
}

impl TestBus {
    fn new() -> TestBus {
        let directory = tempfile::Builder::new().prefix("shmbus-test-").tempdir_in("/tmp").unwrap();
        fs::create_dir(directory.path().join("bus")).unwrap();
        fs::set_permissions(directory.path().join("bus"), fs::Permissions::from_mode(0o700)).unwrap();
        TestBus { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shmbus"));
        command.args(arguments).env("SHMBUS_DIR", self.path("bus")).env_remove("SHMBUS_BUS");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.start(arguments).finish()
    }

    /// Starts a command in the background; its output is collected from now on, so that it never waits for us.
    fn start(&self, arguments: &[&str]) -> Background {
        Background::new(self.command(arguments).spawn().unwrap())
    }

    /// Runs a command that must succeed.
    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail with this code and one line on standard error; the line.
    fn fails(&self, code: i32, arguments: &[&str]) -> String {
        one_line(&self.run(arguments), code, arguments)
    }

    /// Publishes these bytes.
    fn publish(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut child = self.command(&[&["pub"], arguments].concat()).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let publisher = Background::new(child);
        let _ = stdin.write_all(input); // a publisher that fails closes its end early
        drop(stdin);
        publisher.finish()
    }

    fn show(&self, topic: &str) -> Value {
        serde_json::from_str(&self.ok(&["show", topic, "--json"])).unwrap()
    }

    /// Waits until the topic has so many subscribers.
    fn await_subscribers(&self, topic: &str, count: usize) {
        await_that(&format!("{count} subscribers of {topic}"), || {
            self.show(topic)["subscribers"].as_array().unwrap().len() == count
        });
    }

    fn next_sequence(&self, topic: &str) -> u64 {
        self.show(topic)["tail_sequence"].as_u64().unwrap()
    }
}

impl Drop for TestBus {
    fn drop(&mut self) {
        let stopped = self.command(&["stop"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        if !thread::panicking() {
            assert!(stopped.unwrap().success(), "the bus could not be stopped");
        }
    }
}

/// A process under test; killed when its test gives up on it.
struct Running(Child);

impl Running {
    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id() as i32)
    }

    fn stdin(&mut self) -> ChildStdin {
        self.0.stdin.take().unwrap()
    }

    fn stdout(&mut self) -> BufReader<ChildStdout> {
        BufReader::new(self.0.stdout.take().unwrap())
    }

    fn exit_code(&mut self) -> i32 {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(Instant::now() < deadline, "process {} did not end", self.pid());
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn stderr(&mut self) -> String {
        let mut text = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process whose whole output is collected.
struct Background {
    pid: Pid,
    output: Receiver<Output>,
}

impl Background {
    fn new(child: Child) -> Background {
        let pid = Pid::from_raw(child.id() as i32);
        let (sender, output) = channel();
        thread::spawn(move || sender.send(child.wait_with_output().unwrap()));
        Background { pid, output }
    }

    /// Waits for its end; kills it when it takes too long.
    fn finish(self) -> Output {
        self.output.recv_timeout(LIMIT).unwrap_or_else(|_| {
            let _ = kill(self.pid, Signal::SIGKILL);
            panic!("process {} did not end within {LIMIT:?}", self.pid);
        })
    }
}

fn await_that(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "never came: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The one line that a command which must fail has printed.
fn one_line(output: &Output, code: i32, what: &[&str]) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{what:?}: {text}");
    assert_eq!(text.lines().count(), 1, "{what:?}: {text}");
    assert!(text.starts_with("shmbus: "), "{what:?}: {text}");
    text
}

/// Lines of every awkward kind, and one last line without newline.
fn awkward_text(lines: u32) -> Vec<u8> {
    let mut text = b"\n\n\r\n a\tb \r\n\0\0\n\xff\xfe not utf-8\nshort\n".to_vec();
    text.extend(vec![b'x'; 300_000]);
    text.push(b'\n');
    (0..lines).for_each(|i| text.extend(format!("line {i} of the file\n").bytes()));
    text.extend(b"the last line has no newline");
    text
}

#[test]
fn a_text_file_arrives_byte_for_byte_with_the_subscriber_before() {
    let bus = TestBus::new();
    let text = awkward_text(50_000);
    bus.ok(&["create", "text"]);
    let subscriber = bus.start(&["sub", "text", "--count", &(50_000 + 9).to_string()]);
    bus.await_subscribers("text", 1);
    let published = bus.publish(&["text", "--lines", "--json"], &text);
    assert!(published.status.success(), "{published:?}");
    let summary: Value = serde_json::from_slice(&published.stdout).unwrap();
    assert_eq!(summary["messages"], 50_009);
    assert_eq!(summary["bytes"], text.len());
    assert_eq!((&summary["first_sequence"], &summary["last_sequence"]), (&0.into(), &50_008.into()));
    let received = subscriber.finish();
    assert!(received.status.success() && received.stderr.is_empty(), "{:?}", received.stderr);
    assert!(received.stdout == text, "the copy differs");
}

/// A kill in the middle of it: the same command again publishes the rest.
#[test]
fn a_named_rerun_skips_what_is_there() {
    let bus = TestBus::new();
    let text = awkward_text(20_000);
    bus.ok(&["create", "text", "--messages", "30000", "--bytes", "16M"]);
    let mut publisher = bus.command(&["pub", "text", "--as", "importer"]).stdin(Stdio::piped()).spawn().unwrap();
    // Left open: at the end of its input, the half line would be a message.
    let mut input = publisher.stdin.take().unwrap();
    input.write_all(&text[..text.len() / 2]).unwrap();
    await_that("a part of it", || bus.next_sequence("text") > 0);
    publisher.kill().unwrap();
    publisher.wait().unwrap();
    for _ in 0..2 {
        let again = bus.publish(&["text", "--as", "importer"], &text);
        assert!(again.status.success(), "{again:?}");
        assert!(String::from_utf8_lossy(&again.stderr).contains("published before and skipped"), "{again:?}");
    }
    assert_eq!(bus.show("text")["names"][0]["last_number"], 20_009);
    let received = bus.run(&["sub", "text", "--from", "oldest", "--idle-exit", "300"]);
    assert!(received.stdout == text, "the copy differs");
}

#[test]
fn a_text_file_waits_for_a_later_subscriber() {
    let bus = TestBus::new();
    let text = awkward_text(50_000);
    bus.ok(&["create", "text", "--messages", "60000", "--bytes", "16M"]);
    assert!(bus.publish(&["text"], &text).status.success());
    let received = bus.run(&["sub", "text", "--from", "oldest", "--idle-exit", "300"]);
    assert!(received.status.success() && received.stdout == text, "the copy differs");
    let last = bus.run(&["sub", "text", "--from", "last:1", "--count", "1"]);
    assert_eq!(last.stdout, b"the last line has no newline");
}

#[test]
fn two_publishers_each_keep_their_order() {
    let bus = TestBus::new();
    bus.ok(&["create", "both"]);
    let subscriber = bus.start(&["sub", "both", "--count", "40000"]);
    bus.await_subscribers("both", 1);
    let lines = |name: &str| (0..20_000).map(|i| format!("{name} {i}\n")).collect::<String>();
    thread::scope(|scope| {
        for name in ["a", "b"] {
            let bus = &bus;
            scope.spawn(move || assert!(bus.publish(&["both", "--lines"], lines(name).as_bytes()).status.success()));
        }
    });
    let received = String::from_utf8(subscriber.finish().stdout).unwrap();
    for name in ["a", "b"] {
        let own: String = received.split_inclusive('\n').filter(|line| line.starts_with(name)).collect();
        assert!(own == lines(name), "the lines of {name} are not in their order");
    }
}

#[test]
fn a_binary_file_in_chunks_is_the_same_again() {
    let bus = TestBus::new();
    let mut state = 1u64;
    let bytes: Vec<u8> = (0..9_000_001)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .collect();
    bus.ok(&["create", "file", "--hold"]);
    let subscriber = bus.start(&["sub", "file", "--from", "oldest", "--count", "138"]);
    assert!(bus.publish(&["file", "--chunk", "64K"], &bytes).status.success());
    assert!(subscriber.finish().stdout == bytes, "the copy differs");
}

#[test]
fn raw_is_one_message_and_json_tells_all_of_it() {
    let bus = TestBus::new();
    for input in [&b"one\ntwo\n"[..], b"\xff\0", b""] {
        assert!(bus.publish(&["raw", "--raw"], input).status.success());
    }
    let text = bus.ok(&["sub", "raw", "--from", "oldest", "--count", "3", "--json"]);
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let field = |name: &str| lines.iter().map(|line| line[name].clone()).collect::<Vec<_>>();
    assert_eq!(field("sequence"), [0, 1, 2].map(Value::from));
    assert_eq!(field("topic"), ["raw"; 3].map(Value::from));
    assert_eq!(field("payload"), ["one\ntwo\n".into(), Value::Null, "".into()]);
    assert_eq!(field("payload_base64"), [Value::Null, "/wA=".into(), Value::Null]);
    for absent in ["timestamp_ns", "key", "attempt"] {
        assert!(lines.iter().all(|line| line.as_object().unwrap().get(absent) == Some(&Value::Null)), "{absent}");
    }
}

#[test]
fn a_line_does_not_wait_for_the_next_one() {
    let bus = TestBus::new();
    bus.ok(&["create", "live"]);
    let mut subscriber = Running(bus.command(&["sub", "live"]).spawn().unwrap());
    bus.await_subscribers("live", 1);
    let mut publisher = Running(bus.command(&["pub", "live"]).stdin(Stdio::piped()).spawn().unwrap());
    let (mut input, mut output) = (publisher.stdin(), subscriber.stdout());
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut line = String::new();
        while output.read_line(&mut line).is_ok_and(|count| count > 0) {
            let _ = sender.send(std::mem::take(&mut line));
        }
    });
    for line in ["first\n", "second\n"] {
        input.write_all(line.as_bytes()).unwrap();
        assert_eq!(receiver.recv_timeout(LIMIT).unwrap(), line);
    }
    drop(input);
    assert_eq!(publisher.exit_code(), 0);
}

#[test]
fn a_topic_that_does_not_exist() {
    let bus = TestBus::new();
    for arguments in [&["sub", "nosuch"][..], &["show", "nosuch"], &["rm", "nosuch"]] {
        assert!(bus.fails(1, arguments).contains("nosuch"));
    }
    assert!(bus.ok(&["ls"]).contains("no topics"));
}

#[test]
fn wrong_usage_is_code_2() {
    let bus = TestBus::new();
    for arguments in [&["pub"][..], &["sub", "t", "--from", "x"], &["nonsense"], &["pub", "t", "--raw", "--lines"]] {
        bus.fails(2, arguments);
    }
}

#[test]
fn a_usage_error_says_what_to_write_and_whose_help_to_read() {
    let bus = TestBus::new();
    for (arguments, said) in [
        (&["create", "t", "--nonsense"][..], "'--nonsense' found (see `shmbus create --help`)"),
        (&["sub", "t", "--count", "x"], "write a whole number"),
        (&["sub", "t", "--from", "-5"], "write latest, oldest"),
        (&["group", "rewind", "t", "g"], "(see `shmbus group rewind --help`)"),
        (&["create", "t", "--mode", "exclusive", "--publishers", "3"], "one publisher at a time"),
        (&["create", "t", "--mode", "channel", "--subscribers", "3"], "one subscriber"),
        (&["pub", "Consumer.g.VirtualTopic.t"], "name the topic, VirtualTopic.X, itself"),
    ] {
        let line = bus.fails(2, arguments);
        assert!(line.contains(said) && !line.contains("as a value"), "{arguments:?}: {line}");
    }
}

#[test]
fn a_full_disk_is_named() {
    let bus = TestBus::new();
    bus.ok(&["create", "t"]);
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for arguments in [&["ls"][..], &["show", "t", "--json"]] {
        let output = Background::new(bus.command(arguments).stdout(full()).spawn().unwrap()).finish();
        assert!(one_line(&output, 1, arguments).contains("cannot write standard output"));
    }
}

#[test]
fn names_that_cannot_be() {
    let bus = TestBus::new();
    let long = "n".repeat(300);
    for name in ["a/b", "../up", "", "a b", "a..b", "a*", long.as_str()] {
        for command in ["create", "pub", "sub", "show", "rm"] {
            bus.fails(2, &[command, name]);
        }
    }
    bus.fails(1, &["--bus", "a/b", "ls"]);
    // The operating system itself takes no NUL in an argument.
    assert!(bus.command(&["create", "a\0b"]).spawn().is_err());
}

#[test]
fn a_typed_topic_takes_its_size_only() {
    let bus = TestBus::new();
    bus.ok(&["create", "typed", "--schema", "Tick", "--size", "8", "--align", "8"]);
    assert!(bus.publish(&["typed", "--chunk", "8"], b"12345678abcdefgh").status.success());
    let output = bus.publish(&["typed", "--chunk", "8"], b"ABCDEFGH1234");
    let said = one_line(&output, 1, &["pub --chunk 8"]);
    assert!(said.contains("Tick") && said.contains("message 2:"), "{said}");
    assert_eq!(bus.next_sequence("typed"), 3, "what came before the bad message is published");
    let difference = bus.fails(1, &["create", "typed", "--exist-ok"]);
    assert!(difference.contains("exists"), "{difference}");
}

#[test]
fn a_message_larger_than_the_topic_takes() {
    let bus = TestBus::new();
    bus.ok(&["create", "small", "--bytes", "4096"]);
    let input = [&b"fits\n"[..], &[b'x'; 5000], b"\nnever\n"].concat();
    let said = one_line(&bus.publish(&["small"], &input), 1, &["pub small"]);
    assert!(said.contains("5001") && said.contains("4096") && said.contains("1 message"), "{said}");
    assert_eq!(bus.ok(&["sub", "small", "--from", "oldest", "--idle-exit", "100"]), "fits\n");
}

#[test]
fn a_full_ring_that_rejects_says_what_it_took() {
    let bus = TestBus::new();
    bus.ok(&["create", "full", "--messages", "10", "--full", "reject", "--hold", "--mode", "exclusive"]);
    let input: String = (0..20).map(|i| format!("{i}\n")).collect();
    let said = one_line(&bus.publish(&["full"], input.as_bytes()), 1, &["pub full"]);
    assert!(said.contains("full") && said.contains("10 messages"), "{said}");
    let held = bus.ok(&["sub", "full", "--from", "oldest", "--idle-exit", "100"]);
    assert_eq!(held, (0..10).map(|i| format!("{i}\n")).collect::<String>());
}

#[test]
fn overwritten_messages_are_reported_exactly() {
    let bus = TestBus::new();
    bus.ok(&["create", "over", "--messages", "16", "--full", "overwrite"]);
    // Written one by one: a batch may fill one place of the ring with many messages.
    let mut publisher = Running(bus.command(&["pub", "over", "--chunk", "1"]).stdin(Stdio::piped()).spawn().unwrap());
    publisher.stdin().write_all(&[b'x'; 50_000]).unwrap();
    assert_eq!(publisher.exit_code(), 0, "{}", publisher.stderr());
    let text = bus.ok(&["sub", "over", "--from", "0", "--idle-exit", "100", "--json"]);
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let lost_to = lines[0]["lagged_to"].as_u64().unwrap();
    assert_eq!(lines[0]["lagged_from"], 0);
    let sequences: Vec<u64> = lines[1..].iter().map(|line| line["sequence"].as_u64().unwrap()).collect();
    assert_eq!(sequences, (lost_to..50_000).collect::<Vec<_>>());
}

#[test]
fn a_closed_standard_output_ends_quietly() {
    let bus = TestBus::new();
    let text: String = (0..50_000).map(|i| format!("{i}\n")).collect();
    bus.ok(&["create", "t", "--messages", "60000"]);
    assert!(bus.publish(&["t"], text.as_bytes()).status.success());
    let mut subscriber = Running(bus.command(&["sub", "t", "--from", "oldest"]).spawn().unwrap());
    let mut first = String::new();
    subscriber.stdout().read_line(&mut first).unwrap(); // and close, as `head -1` does
    assert_eq!(first, "0\n");
    assert_eq!((subscriber.exit_code(), subscriber.stderr()), (0, String::new()));
    // Also when nothing more comes that could be written.
    let mut waiting = Running(bus.command(&["sub", "t"]).spawn().unwrap());
    drop(waiting.stdout());
    assert_eq!((waiting.exit_code(), waiting.stderr()), (0, String::new()));
    let again = bus.run(&["sub", "t", "--from", "oldest", "--count", "50000"]);
    assert!(again.stdout == text.as_bytes(), "nothing is lost for others");
}

#[test]
fn ctrl_c_writes_what_was_received() {
    let bus = TestBus::new();
    bus.ok(&["create", "t"]);
    let subscriber = bus.start(&["sub", "t"]);
    let subscriber_pid = subscriber.pid;
    bus.await_subscribers("t", 1);
    let mut publisher = Running(bus.command(&["pub", "t"]).stdin(Stdio::piped()).spawn().unwrap());
    let mut input = publisher.stdin();
    input.write_all(b"one\ntwo\nhalf a li").unwrap();
    await_that("both lines", || bus.next_sequence("t") == 2);
    await_that("no lag", || bus.show("t")["subscribers"][0]["lag"] == 0);
    kill(publisher.pid(), Signal::SIGINT).unwrap();
    assert_eq!(publisher.exit_code(), 130);
    let said = publisher.stderr();
    assert!(said.contains("2 messages") && said.lines().count() == 1, "{said}");
    kill(subscriber_pid, Signal::SIGINT).unwrap();
    let output = subscriber.finish();
    assert_eq!((output.status.code(), &*output.stdout), (Some(130), &b"one\ntwo\n"[..]));
}

#[test]
fn ctrl_c_frees_a_publisher_from_a_full_ring() {
    let bus = TestBus::new();
    bus.ok(&["create", "t", "--messages", "4", "--hold"]);
    let mut publisher = Running(bus.command(&["pub", "t"]).stdin(Stdio::piped()).spawn().unwrap());
    let mut input = publisher.stdin();
    input.write_all(&b"line\n".repeat(100)).unwrap();
    await_that("a full ring", || bus.next_sequence("t") >= 4);
    kill(publisher.pid(), Signal::SIGINT).unwrap();
    assert_eq!(publisher.exit_code(), 130);
    assert_eq!(publisher.stderr().lines().count(), 1);
}

#[test]
fn topics_that_go_away() {
    let bus = TestBus::new();
    bus.ok(&["create", "a"]);
    bus.ok(&["create", "b"]);
    let removed = bus.start(&["sub", "a"]);
    let stopped = bus.start(&["sub", "b"]);
    bus.await_subscribers("a", 1);
    bus.await_subscribers("b", 1);
    assert!(bus.fails(1, &["rm", "a"]).contains("--force"));
    bus.ok(&["rm", "a", "--force"]);
    one_line(&removed.finish(), 1, &["sub a"]);
    bus.ok(&["stop"]);
    one_line(&stopped.finish(), 0, &["sub b"]);
    assert!(bus.ok(&["stop"]).contains("not running"));
}

#[test]
fn a_directory_that_must_not_be_trusted() {
    let bus = TestBus::new();
    fs::set_permissions(bus.path("bus"), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(bus.fails(1, &["ls"]).contains("bus"));
    fs::set_permissions(bus.path("bus"), fs::Permissions::from_mode(0o700)).unwrap();
    if nix::unistd::geteuid().is_root() {
        chown(bus.path("bus"), Some(12_345), None).unwrap();
        bus.fails(1, &["ls"]);
        chown(bus.path("bus"), Some(0), None).unwrap();
    }
    bus.ok(&["ls"]);
}

#[test]
fn who_may_not_serve_in_a_directory_is_told_who_may() {
    let bus = TestBus::new();
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    fs::set_permissions(bus.path("."), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(bus.path("bus"), fs::Permissions::from_mode(0o755)).unwrap();
    // As somebody else: his command may look here, and that is all.
    let mut command = bus.command(&["ls"]);
    std::os::unix::process::CommandExt::uid(&mut command, 12_345);
    let Ok(child) = command.spawn() else { return }; // he may not execute the tests' program
    let said = one_line(&Background::new(child).finish(), 1, &["ls as another user"]);
    assert!(said.contains("may not start one") && said.contains("shmbus serve"), "{said}");
}

#[test]
fn the_byte_budget_is_kept() {
    let bus = TestBus::new();
    let limited = |arguments: &[&str]| {
        Background::new(bus.command(arguments).env("SHMBUS_BUDGET", "67108864").spawn().unwrap()).finish()
    };
    // The first one starts the coordinator, which keeps the budget it was given.
    assert!(limited(&["create", "small", "--bytes", "1M"]).status.success());
    let said = one_line(&limited(&["create", "large", "--bytes", "1G"]), 1, &["create large"]);
    assert!(said.contains("budget"), "{said}");
    assert!(limited(&["create", "small2", "--bytes", "1M"]).status.success());
}

#[test]
fn no_spawn_starts_nothing() {
    let bus = TestBus::new();
    assert!(bus.fails(1, &["--no-spawn", "ls"]).contains("no coordinator"));
    assert_eq!(fs::read_dir(bus.path("bus")).unwrap().count(), 0);
}

#[test]
fn ls_and_show_tell_the_same_story() {
    let bus = TestBus::new();
    bus.ok(&["create", "a.one", "--messages", "64K", "--mode", "exclusive"]);
    assert!(bus.publish(&["a.two"], b"x\ny\n").status.success());
    bus.ok(&["group", "create", "a.two", "g"]);
    let listed: Vec<Value> =
        bus.ok(&["ls", "--json"]).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(listed.len(), 2);
    assert_eq!(listed[0]["options"]["mode"], "exclusive");
    assert_eq!(listed[0]["options"]["messages"], 65_536);
    assert_eq!(listed[1]["tail_sequence"], 2);
    assert_eq!(listed[1]["groups"][0]["options"]["guarantee"], "at-least-once", "as it is written on the command line");
    for field in ["topic", "oldest_sequence", "publishers", "subscribers", "groups", "options", "memory_bytes"] {
        assert!(listed[1].get(field).is_some(), "{field}");
        assert_eq!(listed[1][field], bus.show("a.two")[field], "{field}");
    }
    assert!(listed[1]["messages_per_s"].is_number());
    let table = bus.ok(&["ls"]);
    assert!(table.contains("a.one") && table.contains("a.two"), "{table}");
    assert!(bus.ok(&["show", "a.one"]).contains("65,536"));
}

/// What a short bench prints; `None` where this machine has no two cores for it.
fn bench(bus: &TestBus, arguments: &[&str]) -> Option<String> {
    let arguments = [&["bench"], arguments, &["--seconds", "0.2"]].concat();
    let deadline = Instant::now() + LIMIT;
    loop {
        let output = bus.run(&arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        if output.status.success() {
            return Some(String::from_utf8(output.stdout).unwrap());
        }
        if said.contains("needs two cores") {
            return None;
        }
        // The host may have moved the cores in each of a few chunks.
        let moved = said.contains("nothing was measured");
        assert!(moved && Instant::now() < deadline, "{arguments:?}: {said}");
    }
}

/// The same as JSON; each line names the workload and a class.
fn bench_lines(bus: &TestBus, arguments: &[&str]) -> Option<Vec<Value>> {
    let printed = bench(bus, &[arguments, &["--json"]].concat())?;
    let lines: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(!lines.is_empty());
    for line in &lines {
        assert_eq!(line["workload"], arguments[0], "{line}");
        assert!(["SMT", "CCX", "FAR"].contains(&line["class"].as_str().unwrap()), "{line}");
        assert!(line["chunks"].as_u64().unwrap() > 0, "{line}");
    }
    Some(lines)
}

#[test]
fn a_short_bench_is_complete() {
    let bus = TestBus::new();
    for workload in ["pingpong", "stream"] {
        for line in bench_lines(&bus, &[workload]).into_iter().flatten() {
            assert_eq!(line["payload_bytes"], 56);
            match workload {
                "pingpong" => assert!(line["ratio_p50"].as_f64().unwrap() > 0.0),
                _ => assert_eq!(line["lost"], 0),
            }
        }
    }
}

/// Every field that a bench's line may have (SPEC §9), and what the four below have beside it.
const BENCH_FIELDS: [&str; 13] = [
    "payload_bytes",
    "p50_ns",
    "p99_ns",
    "p999_ns",
    "bare_p50_ns",
    "bare_p99_ns",
    "bare_p999_ns",
    "ratio_p50",
    "ratio_p99",
    "messages_per_s",
    "bytes_per_s",
    "bare_bytes_per_s",
    "lost",
];

/// The line's fields are all there: these are numbers above 0, or 0 for what was lost, the others null.
fn assert_figures(line: &Value, figures: &[&str], beside: &[&str]) {
    for field in BENCH_FIELDS {
        let found = line.get(field).unwrap_or_else(|| panic!("no {field} in {line}"));
        match figures.contains(&field) {
            true if field == "lost" => assert_eq!(found, 0, "{line}"),
            true => assert!(found.as_f64().is_some_and(|f| f > 0.0), "{field} in {line}"),
            false => assert!(found.is_null(), "{field} in {line}"),
        }
    }
    for field in beside {
        assert!(line[field].as_f64().is_some_and(|f| f > 0.0), "{field} in {line}");
    }
}

const LATENCIES: [&str; 8] =
    ["p50_ns", "p99_ns", "p999_ns", "bare_p50_ns", "bare_p99_ns", "bare_p999_ns", "ratio_p50", "ratio_p99"];

#[test]
fn a_short_fanout_loses_nothing() {
    let bus = TestBus::new();
    for mode in ["exclusive", "many"] {
        for line in bench_lines(&bus, &["fanout", "--subscribers", "3", "--mode", mode]).into_iter().flatten() {
            let figures = ["payload_bytes", "p50_ns", "bare_p50_ns", "bare_p99_ns", "bare_p999_ns", "lost"];
            assert_figures(&line, &figures, &["one_p50_ns", "ratio_one"]);
            assert_eq!((&line["subscribers"], &line["burst"]), (&3.into(), &512.into()));
        }
    }
    if let Some(table) = bench(&bus, &["fanout", "--subscribers", "3", "--size", "1K", "--burst", "20", "--batch", "4"])
    {
        assert!(table.contains("3 subscribers") && table.contains("WITH ONE"), "{table}");
    }
}

#[test]
fn a_short_fanin_loses_nothing() {
    let bus = TestBus::new();
    let figures = ["payload_bytes", "bare_p50_ns", "messages_per_s", "bytes_per_s", "bare_bytes_per_s", "lost"];
    for more in [&["--batch", "16"][..], &["--publishers", "1"], &["--size", "1K"]] {
        for line in bench_lines(&bus, &[&["fanin"], more].concat()).into_iter().flatten() {
            assert_figures(&line, &figures, &["bare_swaps_per_s", "publishers", "batch"]);
            assert_eq!(line["mode"], "many");
        }
    }
    if let Some(table) = bench(&bus, &["fanin"]) {
        assert!(table.contains("publishers: 2") && table.contains("BARE SWAPS/S"), "{table}");
    }
}

#[test]
fn a_short_wake_is_complete() {
    let bus = TestBus::new();
    for line in bench_lines(&bus, &["wake", "--idle", "100"]).into_iter().flatten() {
        assert_figures(&line, &[&["payload_bytes"], &LATENCIES[..]].concat(), &["wakes", "canary_p50_ns"]);
        assert_eq!(line["idle_us"], 100);
        // Nobody returns from a sleep within a microsecond: both slept.
        assert!(line["p50_ns"].as_f64().unwrap() > 1e3 && line["bare_p50_ns"].as_f64().unwrap() > 1e3, "{line}");
    }
    if let Some(table) = bench(&bus, &["wake", "--mode", "many"]) {
        assert!(table.contains("50 µs of sleep") && table.contains("BARE P50"), "{table}");
    }
}

#[test]
fn a_short_join_is_complete() {
    let bus = TestBus::new();
    let Some(lines) = bench_lines(&bus, &["join", "--topics", "5"]) else { return };
    for line in &lines {
        assert_figures(line, &LATENCIES, &["joins", "canary_p50_ns"]);
        assert_eq!((&line["topic_bytes"], &line["topics"]), (&(1 << 20).into(), &5.into()));
    }
    for handle in ["subscriber", "publisher", "bus and subscriber"] {
        assert!(lines.iter().any(|line| line["handle"] == handle), "{handle}: {lines:?}");
    }
    if let Some(table) = bench(&bus, &["join", "--bytes", "64K"]) {
        assert!(table.contains("64 KiB") && table.contains("bus and subscriber"), "{table}");
    }
}

#[test]
fn a_bench_that_cannot_be_is_refused() {
    let bus = TestBus::new();
    for (arguments, said) in [
        (["fanout", "--subscribers", "0"], "1..=1024"),
        (["fanout", "--subscribers", "1025"], "1..=1024"),
        (["fanin", "--publishers", "3"], "1..=2"),
        (["fanin", "--mode", "exclusive"], "--mode"),
        (["wake", "--idle", "0"], "1..=100000"),
        (["join", "--topics", "15001"], "0..=15000"),
        (["join", "--bytes", "2G"], "at most 1073741824"),
    ] {
        assert!(bus.fails(2, &[&["bench"], &arguments[..]].concat()).contains(said), "{arguments:?}");
    }
    for (arguments, said) in [
        (["fanout", "--mode", "channel"], "one subscriber"),
        (["fanout", "--burst", "2049"], "1 to 2048"),
        (["fanout", "--batch", "1025"], "1 to 1024"),
        (["fanin", "--ring", "1"], "half of what the ring holds is 0"),
    ] {
        let line = bus.fails(1, &[&["bench"], &arguments[..]].concat());
        assert!(line.contains(said) || line.contains("needs two cores"), "{arguments:?}: {line}");
    }
}
