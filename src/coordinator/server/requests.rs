//! What participants ask, and what others have to be told before it is answered.

use std::collections::BTreeSet;
use std::io;
use std::time::Instant;

use super::Server;
use crate::coordinator::connection::{Connection, Push};
use crate::coordinator::estate::{Granted, Outcome, Progress};
use crate::coordinator::link::Link;
use crate::coordinator::protocol::{Answer, Request, TopicInfo};
use crate::error::Refusal;

impl Server {
    pub(super) fn serve_request(&mut self, id: u64, request: Request, once: u64) -> io::Result<()> {
        let Some(client) = self.clients.get(&id) else { return Ok(()) };
        let incarnation = client.incarnation;
        if self.do_in_part(id, &request, once) {
            self.put_off(id, request, once);
            return Ok(());
        }
        match (incarnation, request) {
            (None, Request::Hello { protocol, token, incarnation, holds }) => {
                self.hello(id, protocol, token, incarnation, &holds)
            }
            (Some(_), Request::Present { info, names }) => {
                self.hear_too_late(id, &info, names);
                Ok(())
            }
            (Some(incarnation), Request::PresentNotice { wildcard }) => {
                self.hear_of_notice(id, incarnation, wildcard);
                Ok(())
            }
            // What was lost is lost; what comes now was not asked for.
            (Some(_), Request::AllPresented { .. }) => {
                self.clients.get_mut(&id).into_iter().for_each(Connection::refuse_fds);
                Ok(())
            }
            (None, _) => {
                self.expel(id);
                Ok(())
            }
            (Some(incarnation), Request::Goodbye) => self.bid_farewell(id, incarnation),
            (Some(incarnation), request) if self.wait_for_counts(id, incarnation, &request) => Ok(()),
            (Some(incarnation), Request::Report) => self.report(id, incarnation, Instant::now()),
            (Some(incarnation), request) => self.grant(id, incarnation, request, once),
        }
    }

    /// The notice of a wildcard subscription has come.
    fn hear_of_notice(&mut self, id: u64, incarnation: u64, wildcard: u64) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let Some(notice) = client.take_fds().pop() else { return };
        if let Err(refusal) = self.estate.adopt_presented(incarnation, wildcard, notice) {
            eprintln!("shmbus coordinator: process {}: {refusal}", client.peer.pid);
        }
    }

    /// What is presented of a topic that is lost or removed serves to tell those who hold it.
    fn hear_too_late(&mut self, id: u64, info: &TopicInfo, names: Vec<String>) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let fds = client.take_fds();
        // Each topic's end is told once, of what was asked for: what else may be said of it costs nothing.
        let is_heard = self.estate.is_heard_of(info.id, &names);
        if !client.was_asked_for(info.id, is_heard) {
            return;
        }
        // One segment of each name.
        let segments = names.into_iter().zip(fds).collect();
        if let Err(refusal) = self.estate.end_presented(info, segments) {
            if let Refusal::System { .. } = refusal {
                // Want of something: presented again, it may be heard.
                client.ask_for(&[info.id]);
            }
            eprintln!("shmbus coordinator: process {}: {refusal}", client.peer.pid);
        }
    }

    fn grant(&mut self, id: u64, incarnation: u64, request: Request, once: u64) -> io::Result<()> {
        let Some(client) = self.clients.get_mut(&id) else { return Ok(()) };
        let mut progress = std::mem::take(&mut client.progress);
        let (clients, nobody) = (&self.clients, self.unfinished.is_empty());
        let others = |look: &mut dyn FnMut(&Progress)| {
            clients.values().filter(|_| !nobody).for_each(|client| look(&client.progress));
        };
        let outcome = self.estate.request_once(incarnation, &request, once, &mut progress, &others);
        if let (Ok(Outcome::PutOff), Some(client)) = (&outcome, self.clients.get_mut(&id)) {
            client.progress = progress;
            self.put_off(id, request, once);
        }
        self.announce()?;
        self.spread_news()?;
        let (answer, fds): Granted = match outcome {
            Ok(Outcome::Granted(granted)) => granted,
            Ok(Outcome::Stop) => {
                self.stop();
                (Answer::Done, Vec::new())
            }
            Ok(Outcome::PutOff) => return Ok(()),
            Err(refusal) => (Answer::Refused(refusal), Vec::new()),
        };
        self.send(id, &answer, fds)
    }

    /// Hands new topics to the owners of wildcard subscriptions, before their creator learns that they exist; then wakes
    /// the owners. One without a connection comes back for them, and so does one that must be disconnected.
    fn spread_news(&mut self) -> io::Result<()> {
        let news = self.estate.take_news();
        for news in &news {
            let Some(&id) = self.connected.get(&news.incarnation) else { continue };
            match self.clients.get_mut(&id) {
                // What it asked for itself, as many as it may hold: no reason to disconnect it.
                Some(client) if client.progress.opens(news.wildcard) => {
                    client.push_all([Push::Wildcard(*news)]);
                    self.queue(id, |_| Ok(()))?;
                }
                _ => self.push(id, Push::Wildcard(*news))?,
            }
        }
        let wildcards: BTreeSet<u64> = news.iter().map(|news| news.wildcard).collect();
        wildcards.into_iter().for_each(|wildcard| self.estate.tell(wildcard));
        Ok(())
    }

    /// What was counted `since` then is not counted again.
    pub(super) fn report(&mut self, id: u64, incarnation: u64, since: Instant) -> io::Result<()> {
        let keeper = self.estate.link().and_then(Link::pid);
        let is_connected = |incarnation| self.connected.contains_key(&incarnation);
        let report = self.estate.report(incarnation, since, keeper, is_connected);
        self.send(id, &Answer::Report(report), Vec::new())
    }

    /// Hands new arenas to their readers, before the publisher that will write them learns that it may.
    fn announce(&mut self) -> io::Result<()> {
        for (topic, slot) in self.estate.take_announcements() {
            for reader in self.estate.state().readers_of(topic) {
                let Some(&id) = self.connected.get(&reader) else { continue };
                self.push(id, Push::Arena { topic, slot })?;
            }
        }
        Ok(())
    }
}
