//! Requests and replies: who asks and who answers as victims. The other one learns of it at once, the inbox of the dead goes, and
//! the next ones understand each other.

use std::time::Duration;

use shmbus::{Bus, RequestError, Requester, Responder, Topic, Wait};

use crate::checker::{DEADLINE, Kill, Survivors, Violation, await_within, status};
use crate::scenarios::{Grain, Scenario};
use crate::sleepers::{Favour, Sleeper};
use crate::tracer::between_markers;

/// How the names of inboxes begin.
const INBOX: &str = "_inbox.";

/// How long a requester waits; whoever answers dies long before.
const LIMIT: Duration = Duration::from_secs(20);

fn topic() -> Topic<[u8]> {
    Topic::new("asked").envelope().messages(64).bytes(64 << 10)
}

pub(crate) fn all() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "request",
            stride: 20_000,
            grain: Grain::Access,
            victim: |bus, life| {
                let mut requester = bus.requester(topic()).unwrap();
                requester.set_wait(Wait::Park);
                between_markers(|| requester.request(&life.to_le_bytes(), LIMIT).unwrap())
            },
            survivors: |bus| Ok(Box::new(Others::new(bus, true)?)),
        },
        Scenario {
            name: "reply",
            stride: 20_000,
            grain: Grain::Access,
            victim: |bus, _| {
                let mut responder = bus.responder(topic()).unwrap();
                responder.set_wait(Wait::Park);
                between_markers(|| {
                    let request = responder.recv().unwrap();
                    let reply = reply_to(request.payload());
                    request.reply(&reply).unwrap();
                })
            },
            survivors: |bus| Ok(Box::new(Others::new(bus, false)?)),
        },
    ]
}

fn reply_to(request: &[u8]) -> Vec<u8> {
    request.repeat(2)
}

/// Lives through the deaths of requesters, or of responders.
struct Others {
    bus: Bus,
    responder: Option<Responder>,
    requester: Option<Requester>,
    favour: Option<Favour<Asked>>,
    number: u64,
}

/// Who does the favour, and what came of it.
struct Asked {
    responder: Option<Responder>,
    requester: Option<Requester>,
    number: u64,
    outcome: Result<(), Violation>,
}

impl Asked {
    fn act(&mut self) {
        self.outcome = match (&mut self.responder, &mut self.requester) {
            (Some(responder), _) => answer(responder),
            (_, Some(requester)) => match ask(requester, self.number) {
                // Whoever was to answer is dead, and that was noticed.
                Err(RequestError::NoResponder { .. }) => Ok(()),
                other => other.map_err(|error| format!("the requester: {error}")).and_then(|right| right),
            },
            _ => Err("nobody to do the favour".to_owned()),
        };
    }
}

/// Answers the next request.
fn answer(responder: &mut Responder) -> Result<(), Violation> {
    let request = responder.recv_timeout(DEADLINE).map_err(|error| format!("the responder: {error}"))?;
    let reply = reply_to(request.payload());
    // Who asked may be dead, and its inbox gone with it.
    let _ = request.reply(&reply);
    Ok(())
}

/// Whether the reply is the right one.
fn ask(requester: &mut Requester, number: u64) -> Result<Result<(), Violation>, RequestError> {
    let request = number.to_le_bytes();
    let reply = requester.request(&request, DEADLINE)?;
    Ok(if reply[..] == reply_to(&request) { Ok(()) } else { Err("a reply to something else came".to_owned()) })
}

impl Others {
    fn new(bus: &Bus, answers: bool) -> Result<Others, Violation> {
        let open = |error: shmbus::OpenError| format!("setting up: {error}");
        bus.create(&topic()).map_err(open)?;
        let responder = if answers { Some(bus.responder(topic()).map_err(open)?) } else { None };
        let requester = if answers { None } else { Some(bus.requester(topic()).map_err(open)?) };
        Ok(Others { bus: bus.clone(), responder, requester, favour: None, number: 0 })
    }

    /// The next ones understand each other.
    fn exchange(&mut self) -> Result<(), Violation> {
        let open = |error: shmbus::OpenError| format!("a newcomer: {error}");
        let mut requester = self.bus.requester(topic()).map_err(open)?;
        let mut responder = self.bus.responder(topic()).map_err(open)?;
        self.number += 1;
        let number = self.number;
        std::thread::scope(|scope| {
            let asking = scope.spawn(move || ask(&mut requester, number));
            answer(&mut responder)?;
            let asked = asking.join().map_err(|_| "the requester panicked".to_owned())?;
            asked.map_err(|error| format!("the next requester: {error}"))?
        })
    }
}

impl Survivors for Others {
    fn favour(&mut self, victim: Sleeper) -> Result<(), Violation> {
        self.number += 1;
        let (responder, requester) = (self.responder.take(), self.requester.take());
        let asked = Asked { responder, requester, number: self.number, outcome: Ok(()) };
        self.favour = Some(Favour::begin(victim, asked, Asked::act));
        Ok(())
    }

    fn after(&mut self, kill: Kill) -> Result<(), Violation> {
        if let Some(favour) = self.favour.take() {
            let asked = favour.end()?;
            (self.responder, self.requester) = (asked.responder, asked.requester);
            asked.outcome?;
        }
        // What the dead one asked is answered, or was.
        while let Some(request) = self.responder.as_mut().and_then(|responder| responder.try_recv().transpose()) {
            if let Err(error) = request {
                return Err(format!("the responder: {error}"));
            }
        }
        await_within("the dead one's places and inbox are gone", || {
            let (status, topics) = (status(&self.bus, &topic())?, self.bus.topics().map_err(|e| e.to_string())?);
            let places = (status.subscribers.len(), status.publishers.len());
            let inboxes = topics.iter().filter(|topic| topic.name.starts_with(INBOX)).count();
            let ours = (usize::from(self.responder.is_some()), usize::from(self.requester.is_some()));
            Ok(places == ours && inboxes == ours.1)
        })
        .map_err(|error| format!("{error}: {kill:?}"))?;
        self.exchange()?;
        // Their requests are not for the survivor.
        while self.responder.as_mut().is_some_and(|responder| matches!(responder.try_recv(), Ok(Some(_)))) {}
        Ok(())
    }
}
