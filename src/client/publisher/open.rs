//! Opening publishers.

use std::marker::PhantomData;
use std::sync::Arc;

use super::port::{Port, Tenure};
use super::sealer::Sealer;
use super::{Publisher, PublisherCore};
use crate::client::bus::{Bus, unexpected};
use crate::client::control::Control;
use crate::client::held::Held;
use crate::client::write::Runs;
use crate::coordinator::protocol::{Answer, HandleRef, Identity, Request, TopicInfo};
use crate::error::OpenError;
use crate::os::home::Home;
use crate::shm::segment::Segment;
use crate::topic::{Payload, Topic, TopicOptions};
use crate::wait::Wait;

impl Bus {
    /// Opens a publisher; creates the topic where it does not exist yet.
    ///
    /// # Errors
    /// The topic carries another type, is exclusive and has its publisher, or a limit is reached; see [`OpenError`].
    pub fn publisher<T: Payload + ?Sized>(&self, topic: Topic<T>) -> Result<Publisher<T>, OpenError> {
        self.open_publisher(topic, None)
    }

    /// The same for a topic that somebody else must have created, if its options are accepted: they are looked at before its memory
    /// is.
    pub(crate) fn existing_publisher<T: Payload + ?Sized>(
        &self,
        topic: Topic<T>,
        accept: impl Fn(&TopicOptions) -> Result<(), OpenError>,
    ) -> Result<Publisher<T>, OpenError> {
        // Before a place is asked for, which the coordinator makes memory for; and after it, in case it is another topic by then.
        accept(&self.topic(topic.name())?.options)?;
        let core = PublisherCore::open(self.control(), topic.name(), topic.options(), false, None, accept)?;
        Ok(Publisher { core, payload: PhantomData })
    }

    /// Opens a publisher under a name, which goes on where the last publisher of that name ended: see
    /// [`Publisher::last_number`] and [`Publisher::publish_numbered`]. A name belongs to its topic.
    ///
    /// On a topic for many, a publisher that has the name and lives is *fenced*: whatever it was doing, nothing it publishes
    /// comes after this, and it gets [`PublishError::Fenced`](crate::PublishError::Fenced). On an exclusive topic it keeps its place, and the
    /// name, until it ends.
    ///
    /// # Errors
    /// As [`Self::publisher`]; the topic is a channel, has 1,024 names already, or its ring is so full that its present
    /// publisher cannot be fenced.
    pub fn publisher_as<T: Payload + ?Sized>(&self, topic: Topic<T>, name: &str) -> Result<Publisher<T>, OpenError> {
        self.open_publisher(topic, Some(Identity::Named(name.to_owned())))
    }

    fn open_publisher<T: Payload + ?Sized>(
        &self,
        topic: Topic<T>,
        identity: Option<Identity>,
    ) -> Result<Publisher<T>, OpenError> {
        let core = PublisherCore::open(self.control(), topic.name(), topic.options(), true, identity, |_| Ok(()))?;
        Ok(Publisher { core, payload: PhantomData })
    }
}

impl PublisherCore {
    /// A publisher's place on a topic with these options; with `create` the topic is created where it does not exist. Its memory is
    /// left alone unless the options that it has are accepted.
    pub(super) fn open(
        control: &Arc<Control>,
        topic: &str,
        options: TopicOptions,
        create: bool,
        identity: Option<Identity>,
        accept: impl FnOnce(&TopicOptions) -> Result<(), OpenError>,
    ) -> Result<PublisherCore, OpenError> {
        let schema = options.schema.clone();
        let create = create.then_some(options);
        let request = Request::OpenPublisher { topic: topic.to_owned(), schema, create, identity };
        let (answer, fds) = control.request(&request)?;
        let Answer::PublisherOpened { info, slot, publisher, opening, tenancy, last_number, segments } = answer else {
            return Err(unexpected(&answer));
        };
        let handle = HandleRef::Publisher { topic: info.id, slot };
        let held = Held::new(control.clone(), handle);
        accept(&info.options)?;
        let info = Arc::new(info);
        let place = Tenure { slot, publisher, opening, tenancy, last_number };
        let port = Port::attach(&info, place, &segments, fds, control)?;
        let mut core = PublisherCore::new(port, &info, control.home());
        core.name = info.name.clone();
        core.id = publisher;
        core.named = last_number.is_some();
        core.before = last_number.unwrap_or(0);
        core.held = Some(held);
        Ok(core)
    }

    /// A stand-alone channel's sender.
    pub(crate) fn stand_alone(info: &TopicInfo, segment: &Segment, home: Home) -> Self {
        PublisherCore::new(Port::channel(info, segment, true), info, home)
    }

    /// What a publisher without a coordinator has.
    fn new(port: Port, info: &TopicInfo, home: Home) -> PublisherCore {
        PublisherCore {
            space_bell: port.space_bell(),
            port,
            options: info.options.clone(),
            sealer: Sealer::new(info),
            name: String::new(),
            groups: Vec::new(),
            id: 0,
            named: false,
            before: 0,
            runs: Runs::default(),
            wait: Wait::default(),
            held: None,
            home,
        }
    }
}
