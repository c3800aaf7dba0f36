//! Step 1: several publishers, several subscribers, one order.

use std::time::{Duration, Instant};

use anyhow::ensure;
use serde::Serialize;
use shmbus::{Bus, Topic};

use super::screen::Screen;
use super::worker::{Numbered, Worker};
use crate::output::grouped;
use crate::sandbox::Sandbox;

const TOPIC: &str = "demo.order";
const PUBLISHERS: u64 = 3;
const SUBSCRIBERS: u64 = 3;
const MESSAGES_EACH: u64 = 200_000;
const LIMIT: Duration = Duration::from_secs(30);

#[derive(Serialize)]
struct Found {
    publishers: u64,
    subscribers: u64,
    messages: u64,
    digest: String,
    seconds: f64,
}

pub(super) fn run(screen: &Screen, sandbox: &Sandbox, bus: &Bus) -> anyhow::Result<()> {
    screen.heading(1, "Three publishers, three subscribers, one topic: one order for all")?;
    bus.create_topic(TOPIC, &Topic::<Numbered>::named(TOPIC).options(), false)?;
    let total = PUBLISHERS * MESSAGES_EACH;
    let subscribers = (0..SUBSCRIBERS)
        .map(|_| Worker::start(sandbox, &["subscribe", TOPIC, &total.to_string()]))
        .collect::<Result<Vec<_>, _>>()?;
    let mut publishers = (0..PUBLISHERS)
        .map(|i| Worker::start(sandbox, &["publish", TOPIC, &i.to_string(), &MESSAGES_EACH.to_string()]))
        .collect::<Result<Vec<_>, _>>()?;
    let started = Instant::now();
    let deadline = started + LIMIT;
    publishers.iter_mut().try_for_each(Worker::go)?;
    for publisher in &publishers {
        publisher.expect("published", deadline)?;
    }
    let digests = subscribers.iter().map(|s| s.expect("digest", deadline)).collect::<Result<Vec<_>, _>>()?;
    let seconds = started.elapsed().as_secs_f64();
    for (i, (subscriber, digest)) in subscribers.iter().zip(&digests).enumerate() {
        let pid = subscriber.process.pid();
        screen.line(&format!("   subscriber {i} (process {pid}): {} messages, order {digest}", grouped(total)))?;
    }
    ensure!(digests.iter().all(|d| *d == digests[0]), "the subscribers saw different orders: {digests:?}");
    let rate = grouped((total as f64 / seconds) as u64);
    screen
        .holds(&format!("every subscriber has every message, in the same order ({rate} messages/s, six processes)"))?;
    let digest = digests[0].clone();
    let found = Found { publishers: PUBLISHERS, subscribers: SUBSCRIBERS, messages: total, digest, seconds };
    Ok(screen.passed("order", &found)?)
}
