//! Typed payloads: a plain-data struct is the message; its name and size are checked when a handle is opened.

use shmbus::{Bus, Topic};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Tick {
    symbol: u32,
    quantity: u32,
    price: u64,
}

const TICKS: Topic<Tick> = Topic::new("example.ticks").exclusive();

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let bus = Bus::open_default()?;
    let mut ticks = bus.publisher(TICKS)?;
    let mut feed = bus.subscriber(TICKS).open()?;

    ticks.publish(&Tick { symbol: 7, quantity: 1, price: 101 })?;
    let tick = feed.recv()?;
    println!("{} costs {} (sequence {})", tick.symbol, tick.price, tick.sequence());

    if let Err(error) = bus.publisher(Topic::<u64>::new("example.ticks")) {
        println!("another type is refused: {error}");
    }
    drop((ticks, feed));
    bus.remove_topic("example.ticks", false)?;
    Ok(())
}
