//! The connection to a bus, and what can be done with its topics as a whole.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::access::Access;
use crate::client::control::{Control, Granted, launch, watch};
use crate::coordinator::directory::Place;
use crate::coordinator::protocol::{Answer, BusReport, NameStatus, Purged, Request, TopicStatus};
use crate::error::{ConnectError, OpenError};
use crate::topic::{Payload, Topic, TopicOptions};

/// Environment variable that names the bus.
const BUS_VARIABLE: &str = "SHMBUS_BUS";

/// The bus's name where none is given.
const DEFAULT_BUS: &str = "default";

/// A connection to a bus. Cheap to clone; handles keep it alive, and the last of them to go closes it.
///
/// It belongs to the process that opened it: after a fork, the child opens its own.
#[derive(Clone)]
pub struct Bus {
    control: Arc<Control>,
}

/// How to open a bus; see [`Bus::options`].
#[derive(Clone, Debug)]
pub struct BusOptions {
    name: Option<String>,
    directory: Option<PathBuf>,
    spawn: bool,
}

impl BusOptions {
    /// The bus's name. Default: `$SHMBUS_BUS`, else `default`.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        self.name = Some(name.to_owned());
        self
    }

    /// The socket directory. Default: `$SHMBUS_DIR`, `/run/shmbus`, `$XDG_RUNTIME_DIR/shmbus`, else
    /// `/tmp/shmbus-UID`.
    #[must_use]
    pub fn directory(mut self, directory: PathBuf) -> Self {
        self.directory = Some(directory);
        self
    }

    /// Whether to start a coordinator where none runs (default: yes).
    #[must_use]
    pub fn spawn(mut self, spawn: bool) -> Self {
        self.spawn = spawn;
        self
    }

    /// Opens the bus.
    pub fn open(self) -> Result<Bus, ConnectError> {
        let from_environment = || std::env::var(BUS_VARIABLE).ok().filter(|name| !name.is_empty());
        let name = self.name.or_else(from_environment).unwrap_or_else(|| DEFAULT_BUS.to_owned());
        let place = Place::find(&name, self.directory.as_deref())?;
        let control = Arc::new(launch::connect(&place, self.spawn)?);
        watch::start(&control);
        Ok(Bus { control })
    }
}

impl Bus {
    /// Opens the bus that `$SHMBUS_BUS` names, else `default`, and starts a coordinator where none runs.
    pub fn open_default() -> Result<Bus, ConnectError> {
        Self::options().open()
    }

    /// Opens the bus of this name, and starts a coordinator where none runs.
    pub fn open(name: &str) -> Result<Bus, ConnectError> {
        Self::options().name(name).open()
    }

    /// Opens a bus with options.
    pub fn options() -> BusOptions {
        BusOptions { name: None, directory: None, spawn: true }
    }

    /// A connection for the moment, to a bus that runs: it does not come back by itself when that ends.
    pub(crate) fn visit(place: &Place) -> Result<Bus, ConnectError> {
        Ok(Bus { control: Arc::new(launch::connect(place, false)?) })
    }

    /// The bus's name.
    pub fn name(&self) -> &str {
        self.control.bus_name()
    }

    /// Creates a topic with the options its declaration implies; one that exists with the same options is fine.
    /// Returns whether it existed.
    pub fn create<T: Payload + ?Sized>(&self, topic: &Topic<T>) -> Result<bool, OpenError> {
        self.create_topic(topic.name(), &topic.options(), true)
    }

    /// Creates a topic. With `exist_ok`, one that exists with the same options is fine. Returns whether it existed.
    pub fn create_topic(&self, name: &str, options: &TopicOptions, exist_ok: bool) -> Result<bool, OpenError> {
        self.create_as(name, options, None, exist_ok, false)
    }

    /// The same with an access list: what others than the user of this process and root may do on the topic.
    ///
    /// # Errors
    /// With `exist_ok` also where the topic exists with another list.
    pub fn create_topic_with_access(
        &self,
        name: &str,
        options: &TopicOptions,
        access: &Access,
        exist_ok: bool,
    ) -> Result<bool, OpenError> {
        self.create_as(name, options, Some(access.clone()), exist_ok, false)
    }

    /// Creates a topic that is this bus connection's own: it is removed when the connection closes or the process dies.
    ///
    /// # Errors
    /// The topic exists; otherwise as [`Self::create_topic`].
    pub fn create_ephemeral(&self, name: &str, options: &TopicOptions) -> Result<(), OpenError> {
        self.create_as(name, options, None, false, true).map(drop)
    }

    pub(crate) fn create_as(
        &self,
        name: &str,
        options: &TopicOptions,
        access: Option<Access>,
        exist_ok: bool,
        ephemeral: bool,
    ) -> Result<bool, OpenError> {
        let (topic, options) = (name.to_owned(), options.clone());
        match self.control.request_once(&Request::CreateTopic { topic, options, access, exist_ok, ephemeral })?.0 {
            Answer::Created { existed } => Ok(existed),
            other => Err(unexpected(&other)),
        }
    }

    /// Removes a topic and its messages; `force` also while it is in use.
    pub fn remove_topic(&self, name: &str, force: bool) -> Result<(), OpenError> {
        self.done_once(&Request::RemoveTopic { topic: name.to_owned(), force })
    }

    /// Gives up every message of a topic that no subscriber or group holds; what stayed and who holds it is in the answer.
    ///
    /// # Errors
    /// There is no such topic, it is a channel, or all 64 publishers it may have are attached.
    pub fn purge_topic(&self, name: &str) -> Result<Purged, OpenError> {
        match self.control.request(&Request::Purge { topic: name.to_owned() })?.0 {
            Answer::Purged(purged) => Ok(purged),
            other => Err(unexpected(&other)),
        }
    }

    /// Every topic, in the order of names. True at some moment while the answer was made.
    pub fn topics(&self) -> Result<Vec<TopicStatus>, OpenError> {
        Ok(self.list_topics(|request| self.control.request(request).map(Some))?.unwrap_or_default())
    }

    /// The same for who waits no longer than `patience` for each of the coordinator's answers. `None`: one did not come.
    pub(crate) fn topics_within(&self, patience: Duration) -> Result<Option<Vec<TopicStatus>>, OpenError> {
        self.list_topics(|request| self.control.request_until(request, Instant::now() + patience))
    }

    fn list_topics(
        &self,
        ask: impl Fn(&Request) -> Result<Option<Granted>, OpenError>,
    ) -> Result<Option<Vec<TopicStatus>>, OpenError> {
        let mut all: Vec<TopicStatus> = Vec::new();
        loop {
            let after = all.last().map(|topic| topic.name.clone());
            match ask(&Request::Status { topic: None, after })? {
                None => return Ok(None),
                Some((Answer::Status { topics, more }, _)) => {
                    let more = more && !topics.is_empty();
                    all.extend(topics);
                    if !more {
                        return Ok(Some(all));
                    }
                }
                Some((other, _)) => return Err(unexpected(&other)),
            }
        }
    }

    /// One topic. True at some moment while the answer was made.
    pub fn topic(&self, name: &str) -> Result<TopicStatus, OpenError> {
        match self.control.request(&Request::Status { topic: Some(name.to_owned()), after: None })?.0 {
            Answer::Status { mut topics, .. } if topics.len() == 1 => Ok(topics.swap_remove(0)),
            other => Err(unexpected(&other)),
        }
    }

    /// Every name that publishers have published under on a topic, in their order. True at some moment while the answer
    /// was made.
    pub fn publisher_names(&self, topic: &str) -> Result<Vec<NameStatus>, OpenError> {
        let mut all: Vec<NameStatus> = Vec::new();
        loop {
            let after = all.last().map(|status| status.name.clone());
            match self.control.request(&Request::Names { topic: topic.to_owned(), after })?.0 {
                Answer::Names { names, more } => {
                    let more = more && !names.is_empty();
                    all.extend(names);
                    if !more {
                        return Ok(all);
                    }
                }
                other => return Err(unexpected(&other)),
            }
        }
    }

    /// Who serves the bus, who is on it and who holds whom up. True at some moment while the answer was made.
    pub fn report(&self) -> Result<BusReport, OpenError> {
        match self.control.request(&Request::Report)?.0 {
            Answer::Report(report) => Ok(report),
            other => Err(unexpected(&other)),
        }
    }

    /// Ends the bus for everybody: topics and their messages are gone, handles get `Gone`.
    pub fn stop(self) -> Result<(), OpenError> {
        match self.done(&Request::Stop) {
            // Somebody else was faster, or the coordinator died over it and its successor finished it.
            Err(OpenError::Connect(ConnectError::Ended { .. })) => Ok(()),
            other => other,
        }
    }

    /// The control connection, for handles.
    pub(crate) fn control(&self) -> &Arc<Control> {
        &self.control
    }

    pub(crate) fn done_once(&self, request: &Request) -> Result<(), OpenError> {
        match self.control.request_once(request)?.0 {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    fn done(&self, request: &Request) -> Result<(), OpenError> {
        match self.control.request(request)?.0 {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bus").field("name", &self.name()).finish_non_exhaustive()
    }
}

/// An answer to another question than the one asked.
pub(crate) fn unexpected(answer: &Answer) -> OpenError {
    ConnectError::Garbled(format!("unexpected answer {answer:?}")).into()
}
