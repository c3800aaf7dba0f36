//! Subscribing: reads everything the topic still holds, then waits a second for more. Run `publish` first.

use std::time::Duration;

use shmbus::{Bus, RecvError, Start, Topic};

const NEWS: Topic<[u8]> = Topic::new("example.news");

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let bus = Bus::open_default()?;
    let mut news = bus.subscriber(NEWS).start(Start::Oldest).open()?;
    loop {
        match news.recv_timeout(Duration::from_secs(1)) {
            Ok(message) => println!("{}: {}", message.sequence(), String::from_utf8_lossy(&message)),
            Err(RecvError::Lagged { from, to }) => eprintln!("lost {from}..{to}"),
            Err(RecvError::TimedOut) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
