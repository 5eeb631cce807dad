//! Moves bytes between a domain's store page and the server.

use ring_protocol::store::{LinkError, Server};
use ring_protocol::{BadIndices, SharedPage};

use crate::domain::{ConnectionId, DomainId};
use crate::server::{FEATURES, Store};

/// What the caller of [`Link::step`] has to do next.
#[must_use = "a guest that is not notified waits for ever"]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Whether to send to the guest's event channel, because an index moved.
    pub notify: bool,
    /// Whether there is more to do at once, after the other links had their turn.
    pub again: bool,
    /// Set once, when serving stops. The reason is written to the page; from then on only a request to reconnect,
    /// or a new introduction, is served.
    pub stopped: Option<LinkError>,
}

/// One domain's store page, seen from the server.
#[derive(Clone, Debug)]
pub struct Link {
    domain: DomainId,
    server: Server,
    stopped: bool,
}

impl Link {
    /// Starts to serve a newly introduced domain: the page's indices are set to zero.
    ///
    /// # Errors
    /// The guest writes the indices at the same time.
    pub fn introduce<P: SharedPage>(domain: DomainId, page: &P) -> Result<Self, BadIndices> {
        let server = Server::introduce(page, FEATURES)?;
        Ok(Self { domain, server, stopped: false })
    }

    /// Continues to serve a domain after the server was restored (ABI io 9.4), without moving an index. The caller
    /// calls [`step`](Self::step) at once, and notifies the guest once whatever the step returns.
    ///
    /// # Errors
    /// The indices in the page contradict each other.
    pub fn attach<P: SharedPage>(domain: DomainId, page: &P) -> Result<Self, BadIndices> {
        Ok(Self { domain, server: Server::attach(page)?, stopped: false })
    }

    /// The domain that this link serves.
    #[must_use]
    pub const fn domain(&self) -> DomainId {
        self.domain
    }

    /// Sends pending output, takes at most one message, sends the output it caused. To be called on the guest's
    /// event, whenever the store may have output for the guest, and while `again` is set.
    pub fn step<P: SharedPage>(&mut self, page: &P, store: &mut Store) -> Step {
        let id = ConnectionId::Domain(self.domain);
        if self.server.reconnect_requested(page) {
            return self.reconnect(page, store);
        }
        if self.stopped {
            return Step::default();
        }
        let mut notify = false;
        match self.exchange(page, store, id, &mut notify) {
            Ok(again) => Step { notify, again, stopped: None },
            Err(why) => {
                self.stop(page, store, why);
                Step { notify: true, again: false, stopped: Some(why) }
            }
        }
    }

    fn exchange<P: SharedPage>(
        &mut self,
        page: &P,
        store: &mut Store,
        id: ConnectionId,
        notify: &mut bool,
    ) -> Result<bool, LinkError> {
        *notify |= self.send(page, store, id)?;
        *notify |= self.take_message(page, store, id)?;
        *notify |= self.send(page, store, id)?;
        let waiting = self.server.requests.available(page).map_err(|_| LinkError::BadIndices)?;
        Ok(waiting > 0 && store.accepts_input(id))
    }

    /// Reads until one message is complete, the ring is empty, or the server takes no more. A guest that keeps writing
    /// meanwhile prolongs this by at most one message of full length.
    fn take_message<P: SharedPage>(
        &mut self,
        page: &P,
        store: &mut Store,
        id: ConnectionId,
    ) -> Result<bool, LinkError> {
        let mut buffer = [0; 1024];
        let mut moved = false;
        while store.accepts_input(id) {
            let wanted = store.wanted_input(id).min(buffer.len());
            let room = buffer.get_mut(..wanted).unwrap_or_default();
            let count = self.server.requests.read(page, room).map_err(|_| LinkError::BadIndices)?;
            if count == 0 {
                break;
            }
            moved = true;
            let bytes = buffer.get(..count).unwrap_or_default();
            if store.handle(id, bytes).map_err(|_| LinkError::Protocol)?.message {
                break;
            }
        }
        Ok(moved)
    }

    fn send<P: SharedPage>(&mut self, page: &P, store: &mut Store, id: ConnectionId) -> Result<bool, LinkError> {
        let mut moved = false;
        loop {
            let output = store.output(id);
            if output.is_empty() {
                return Ok(moved);
            }
            let sent = self.server.responses.write(page, output);
            let sent = sent.map_err(|_| LinkError::BadIndices)?;
            if sent == 0 {
                return Ok(moved);
            }
            store.output_sent(id, sent);
            moved = true;
        }
    }

    fn reconnect<P: SharedPage>(&mut self, page: &P, store: &mut Store) -> Step {
        store.reset_connection(ConnectionId::Domain(self.domain));
        match Server::introduce(page, FEATURES) {
            Ok(server) => {
                self.server = server;
                self.stopped = false;
                Step { notify: true, again: true, stopped: None }
            }
            Err(_) => {
                self.stop(page, store, LinkError::BadIndices);
                Step { notify: true, again: false, stopped: Some(LinkError::BadIndices) }
            }
        }
    }

    fn stop<P: SharedPage>(&mut self, page: &P, store: &mut Store, why: LinkError) {
        self.stopped = true;
        self.server.report(page, why);
        store.reset_connection(ConnectionId::Domain(self.domain));
    }
}
