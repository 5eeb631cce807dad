//! What guests send to the gateway.

use super::*;
use crate::guests::dhcp_question;
use crate::neighbours::Known;
use crate::rewrite::rewrite;
use crate::translator::share;

impl Gateway {
    pub(super) fn handle_guest(
        &mut self,
        port: PortId,
        frame: &mut [u8],
        info: FrameInfo,
        now_ns: u64,
        out: &mut dyn Output,
    ) -> Result<(), Reason> {
        let headers = Headers::parse(frame, frame.len()).map_err(|_| Reason::Malformed)?;
        if headers.destination != self.settings.mac && !headers.destination.is_group() {
            return Err(Reason::NotForUs);
        }
        if let Kind::Arp(arp) = headers.kind {
            return self.guest_arp(port, &arp, out);
        }
        if let Kind::Ipv4(ip) = headers.kind
            && let Some(datagram) = dhcp_question(frame, &ip)
            && (ip.destination.is_broadcast() || ip.destination == self.settings.address)
        {
            return self.guest_dhcp(port, datagram, now_ns, out);
        }
        let ip = routable(&headers, info)?;
        if headers.destination.is_group() {
            return Err(Reason::NotForUs);
        }
        let guest = self.guests.get_mut(port).ok_or(Reason::Unattached)?;
        if ip.source != guest.address {
            return Err(Reason::Source);
        }
        if ip.destination == self.settings.address {
            if !guest.icmp.take(now_ns) {
                return Err(Reason::Rate);
            }
            answer_echo(frame, &ip).ok_or(Reason::NotForUs)?;
            out.to_guest(port, frame, OWN);
            return Ok(());
        }
        self.route(port, frame, &ip, info, now_ns, out)
    }

    fn guest_arp(&self, port: PortId, arp: &Arp, out: &mut dyn Output) -> Result<(), Reason> {
        let guest = self.guests.get(port).ok_or(Reason::Unattached)?;
        if arp.operation != 1 || arp.target != self.settings.address {
            return Err(Reason::NotForUs);
        }
        if arp.sender_mac != guest.mac || !(arp.sender == guest.address || arp.sender.is_unspecified()) {
            return Err(Reason::Source);
        }
        let own = (self.settings.mac, self.settings.address);
        let answer = Frame::arp(2, own, (guest.mac, arp.sender), guest.mac).ok_or(Reason::Malformed)?;
        out.to_guest(port, answer.bytes(), OWN);
        Ok(())
    }

    fn guest_dhcp(&mut self, port: PortId, datagram: &[u8], now_ns: u64, out: &mut dyn Output) -> Result<(), Reason> {
        let settings = &self.settings;
        let configured = settings.dns.iter().any(Option::is_some);
        let dns = if configured { settings.dns } else { self.uplink.map_or([None; 4], |uplink| uplink.dns) };
        // A guest that comes before the uplink's address asks again soon, and learns the DNS servers then.
        let soon = !configured && self.uplink.is_none();
        let terms = Terms {
            mac: settings.mac,
            address: settings.address,
            network: settings.network,
            router: Some(settings.address),
            dns,
            lease_seconds: if soon { settings.lease_seconds.min(SHORT_LEASE) } else { settings.lease_seconds },
            mtu: settings.mtu,
            domain: &settings.domain,
        };
        let answer = self.guests.dhcp(port, datagram, &terms, now_ns)?;
        out.to_guest(port, answer.bytes(), OWN);
        Ok(())
    }

    /// Routes a guest's packet to the uplink.
    fn route(
        &mut self,
        port: PortId,
        frame: &mut [u8],
        ip: &Ipv4,
        info: FrameInfo,
        now_ns: u64,
        out: &mut dyn Output,
    ) -> Result<(), Reason> {
        let to = ip.destination;
        if self.settings.network.contains(to)
            || to.is_link_local()
            || !crate::client::is_station(to)
            || self.own() == Some(to)
        {
            return Err(Reason::Destination);
        }
        let uplink = self.uplink.ok_or(Reason::NoUplink)?;
        if uplink.network.is_some_and(|network| to == network.broadcast()) {
            return Err(Reason::Destination);
        }
        if crate::bytes::byte(frame, ip.at + 8).is_none_or(|hops| hops <= 1) {
            // Time exceeded.
            self.tell_guest(port, frame, ip, [11, 0], 0, now_ns, out);
            return Err(Reason::Hops);
        }
        let Some(info) = fit(ip, info, self.settings.uplink_mtu) else {
            let may_not_be_cut = be16(frame, ip.at + 6).is_some_and(|flags| flags & 0x4000 != 0);
            if may_not_be_cut {
                // Too long, and the length that is not.
                self.tell_guest(port, frame, ip, [3, 4], self.settings.uplink_mtu, now_ns, out);
            }
            return Err(Reason::TooLong);
        };
        let share = share(self.guests.count());
        let guest = self.guests.get_mut(port).ok_or(Reason::Unattached)?;
        let is_error = matches!(ip.transport, Some(Transport { protocol: L4::Icmp { kind: 3 | 11 | 12 }, .. }));
        if is_error && ip.fragment.is_none() {
            // The guest quotes what it received; the peer gets what it had sent.
            let quoted = quoted(frame, ip)?;
            if quoted.destination != guest.address || quoted.source != to {
                return Err(Reason::NoFlow);
            }
            let port = self.translator.before_error(guest, &quoted, now_ns).ok_or(Reason::NoFlow)?;
            let inside = Change { end: End::Destination, address: uplink.address, port, id: None };
            requote(frame, ip, &quoted, &inside).ok_or(Reason::Malformed)?;
            let change = Change { end: End::Source, address: uplink.address, port: 0, id: None };
            // The error has no port that could be replaced.
            rewrite(frame, &Ipv4 { transport: None, ..*ip }, &change, info.checksum).ok_or(Reason::Malformed)?;
        } else {
            let change = self.translator.outward(guest, frame, ip, uplink.address, share, now_ns)?;
            rewrite(frame, ip, &change, info.checksum).ok_or(Reason::Malformed)?;
        }
        let direct = uplink.network.is_some_and(|network| network.contains(to));
        let hop = if direct { to } else { uplink.router.ok_or(Reason::NoUplink)? };
        let known = self.neighbours.find(hop, uplink.router, &mut guest.neighbours, now_ns).ok_or(Reason::Neighbour)?;
        self.send(frame, hop, known, &uplink, info, out)
    }

    /// Sends a packet to the uplink's next hop, or keeps the packet until the hop is known.
    fn send(
        &mut self,
        frame: &mut [u8],
        hop: Ipv4Addr,
        known: Known,
        uplink: &Address,
        info: FrameInfo,
        out: &mut dyn Output,
    ) -> Result<(), Reason> {
        if known.ask {
            self.send_arp(1, uplink.address, (Mac([0; 6]), hop), Mac::BROADCAST, out);
        }
        put(frame, 6, self.settings.uplink_mac.0).ok_or(Reason::Malformed)?;
        match known.mac {
            Some(mac) => {
                put(frame, 0, mac.0).ok_or(Reason::Malformed)?;
                out.to_uplink(frame, info);
            }
            None if self.neighbours.wait(hop, frame, info) => {}
            None => return Err(Reason::Neighbour),
        }
        Ok(())
    }

    /// Sends a guest an ICMP error about its packet, unless there were too many.
    #[expect(clippy::too_many_arguments, reason = "an error has a kind and a number, and is about a packet of a guest")]
    fn tell_guest(
        &mut self,
        port: PortId,
        frame: &[u8],
        ip: &Ipv4,
        kind: [u8; 2],
        mtu: u16,
        now_ns: u64,
        out: &mut dyn Output,
    ) {
        let own = (self.settings.mac, self.settings.address);
        let Some(guest) = self.guests.get_mut(port) else { return };
        // No errors about errors, nor about later parts.
        let is_error = matches!(ip.transport, Some(Transport { protocol: L4::Icmp { kind }, .. }) if kind != 8);
        let mut make = || {
            let quoted = frame.get(ip.at..(ip.at + QUOTED).min(ip.end))?;
            let mut error = Frame::ipv4(own, (guest.mac, guest.address), protocol::ICMP)?;
            error.push(&kind)?;
            error.push(&[0; 4])?;
            error.push(&mtu.to_be_bytes())?;
            error.push(quoted)?;
            error.finish_icmp()?;
            guest.icmp.take(now_ns).then_some(error)
        };
        if !is_error
            && ip.transport.is_some()
            && let Some(error) = make()
        {
            out.to_guest(port, error.bytes(), OWN);
        }
    }
}
