//! Keys, headers and a time-to-live: the newest order of each customer, whoever asks and whenever.

use std::time::Duration;

use shmbus::{Bus, Envelope, Start, Topic};

const ORDERS: Topic<[u8]> = Topic::new("example.orders").ttl(Duration::from_secs(3600));

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let bus = Bus::open_default()?;
    let mut orders = bus.publisher(ORDERS)?;
    for (customer, order) in [("anna", "3 apples"), ("bert", "a pear"), ("anna", "no, 4 apples")] {
        let envelope = Envelope::new().key(customer.as_bytes()).header("origin", b"shop");
        orders.publish_with(order.as_bytes(), &envelope)?;
    }
    let mut newest = bus.subscriber(ORDERS).start(Start::LastPerKey).open()?;
    while let Some(order) = newest.try_recv()? {
        let customer = String::from_utf8_lossy(order.key().unwrap_or_default());
        println!("{customer}: {}", String::from_utf8_lossy(&order));
    }
    Ok(())
}
