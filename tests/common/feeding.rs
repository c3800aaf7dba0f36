//! Roles of processes that publish for those who wait without blocking a thread.

use std::thread;
use std::time::Duration;

use shmbus::{Bus, Publisher};

use super::{LIMIT, end_with_the_test, hear, mode_of, of_mode, say, small};

/// Publishes what it hears ("index payload") to one of these topics, whose names end in `.` and their mode.
pub(crate) fn publish_when_told(topics: &str) {
    let bus = Bus::open_default().unwrap();
    let mode = |name: &str| mode_of(name.rsplit_once('.').unwrap().1);
    let open = |name: &str| bus.publisher(of_mode(mode(name), small(name))).unwrap();
    let mut publishers: Vec<Publisher<[u8]>> = topics.split(' ').map(open).collect();
    say("open");
    loop {
        let line = hear();
        let (topic, payload) = line.split_once(' ').unwrap();
        publishers[topic.parse::<usize>().unwrap()].publish(payload.as_bytes()).unwrap();
    }
}

/// Publishes 0, 1, 2 and so on; arguments: topic, how many. Rests for `pause` after each `run`, so often that readers go to
/// sleep in between.
pub(crate) fn flood(arguments: &str, run: u64, pause: Duration) {
    end_with_the_test();
    let (topic, count) = arguments.split_once(' ').unwrap();
    let bus = Bus::open_default().unwrap();
    let mut publisher = bus.publisher(small(topic)).unwrap();
    say("open");
    for number in 0..count.parse::<u64>().unwrap() {
        publisher.publish(&number.to_le_bytes()).unwrap();
        if number % run == 0 {
            thread::sleep(pause);
        }
    }
    say("done");
    thread::sleep(LIMIT);
}
