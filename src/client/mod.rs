//! What programs use: the bus and its handles.

/// Runs `$body` with the port inside `$port`, whichever kind of `Port` it is: publishers and subscribers each have an
/// enum of that name with these variants.
macro_rules! with_port {
    ($port:expr, $name:ident => $body:expr) => {
        match $port {
            Port::Exclusive($name) => $body,
            Port::ExclusiveSmall($name) => $body,
            Port::Many($name) => $body,
            Port::Channel($name) => $body,
            Port::ChannelSmall($name) => $body,
        }
    };
}

#[cfg(feature = "async")]
mod asynchronous;
mod blocks;
mod bus;
mod consumer;
pub(crate) mod control;
pub(crate) mod envelope;
mod held;
mod iterate;
mod message;
mod pipeline;
mod pollable;
pub(crate) mod publisher;
mod reactor;
mod read;
mod received;
mod repeats;
mod request;
mod route;
mod runner;
mod seat;
mod select;
pub(crate) mod subscriber;
mod wildcard;
mod write;

#[cfg(feature = "async")]
pub use asynchronous::MessageStream;
pub use bus::{Bus, BusOptions};
#[cfg(feature = "async")]
pub use consumer::DeliveryStream;
pub use consumer::{Batch, BatchItem, Consumer, ConsumerBuilder, Deliveries, Delivery, Lease, OwnedDelivery};
pub use envelope::Envelope;
pub use iterate::Messages;
pub use message::{Message, OwnedMessage};
pub use pipeline::{Failure, Outputs, Pipeline, PipelineBuilder};
pub use pollable::Pollable;
pub use publisher::{Loan, Publisher};
pub use repeats::Repeats;
pub use request::{Incoming, Reply, Requester, Responder};
pub use route::{Route, RouteBuilder, RouteCounts};
pub use runner::{Runner, RunnerHandle, Stopper};
pub use select::{Waitable, wait_any};
pub use subscriber::{Start, Subscriber, SubscriberBuilder};
pub use wildcard::{OwnedWildcardMessage, WildcardBuilder, WildcardMessage, WildcardSubscriber};
