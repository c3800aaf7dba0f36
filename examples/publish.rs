//! Publishing: a publisher creates its topic and sends a few lines. Run `subscribe` beside it.

use shmbus::{Bus, Topic};

const NEWS: Topic<[u8]> = Topic::new("example.news");

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let bus = Bus::open_default()?;
    let mut news = bus.publisher(NEWS)?;
    for number in 1..=5 {
        let sequence = news.publish(format!("headline {number}").as_bytes())?;
        println!("published sequence {sequence}");
    }
    // The messages stay in the topic's ring for later subscribers; `shmbus rm example.news` removes them.
    Ok(())
}
