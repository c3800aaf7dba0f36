//! A channel: the SPSC ring alone, here between two threads, with no coordinator anywhere.

use shmbus::{Channel, Topic};

const SQUARES: Topic<u64> = Topic::new("squares").messages(1024);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let channel = Channel::create(SQUARES)?;
    let (mut publisher, mut subscriber) = (channel.publisher()?, channel.subscriber()?);
    let sender = std::thread::spawn(move || (0..1000u64).try_for_each(|n| publisher.publish(&(n * n)).map(drop)));

    let mut sum = 0;
    for _ in 0..1000 {
        sum += *subscriber.recv()?;
    }
    sender.join().expect("the sender does not panic")?;
    println!("the sum of the first 1,000 squares is {sum}");
    Ok(())
}
