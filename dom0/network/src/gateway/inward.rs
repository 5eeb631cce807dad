//! What arrives at the gateway from the uplink.

use super::*;
use crate::dhcp::{self, Message};
use crate::rewrite::rewrite;

impl Gateway {
    pub(super) fn handle_uplink(
        &mut self,
        frame: &mut [u8],
        info: FrameInfo,
        now_ns: u64,
        out: &mut dyn Output,
    ) -> Result<(), Reason> {
        let headers = Headers::parse(frame, frame.len()).map_err(|_| Reason::Malformed)?;
        let ours = headers.destination == self.settings.uplink_mac;
        if !ours && !headers.destination.is_broadcast() {
            return Err(Reason::NotForUs);
        }
        if let Kind::Arp(arp) = headers.kind {
            return self.uplink_arp(&arp, now_ns, out);
        }
        let ip = routable(&headers, info)?;
        if let Some(Transport { protocol: L4::Udp { source: dhcp::SERVER, destination: dhcp::CLIENT }, at, end }) =
            ip.transport
            && ip.fragment.is_none()
            && let Some(client) = &mut self.client
        {
            let message = frame.get(at + 8..end).and_then(Message::parse).ok_or(Reason::Dhcp)?;
            let news = client.receive(&message, headers.source, now_ns);
            self.take(news, out);
            // An offer is requested at once.
            self.ask(now_ns, out);
            return Ok(());
        }
        if !ours {
            return Err(Reason::NotForUs);
        }
        let own = self.own().ok_or(Reason::NoUplink)?;
        if ip.destination != own {
            return Err(Reason::Destination);
        }
        // Nobody outside has an address of the guests' network.
        if self.settings.network.contains(ip.source) {
            return Err(Reason::Source);
        }
        match ip.transport {
            Some(Transport { protocol: L4::Icmp { kind: 8 }, .. }) => {
                if !self.echoes.take(now_ns) {
                    return Err(Reason::Rate);
                }
                answer_echo(frame, &ip).ok_or(Reason::Checksum)?;
                out.to_uplink(frame, OWN);
                Ok(())
            }
            Some(Transport { protocol: L4::Icmp { kind: 3 | 11 | 12 }, .. }) if ip.fragment.is_none() => {
                self.uplink_error(frame, &ip, now_ns, out)
            }
            _ => {
                let info = fit(&ip, info, self.settings.mtu).ok_or(Reason::TooLong)?;
                let (port, change) = self.translator.inward(&mut self.guests, frame, &ip, now_ns)?;
                self.deliver(port, frame, &ip, &change, info, out)
            }
        }
    }

    fn uplink_arp(&mut self, arp: &Arp, now_ns: u64, out: &mut dyn Output) -> Result<(), Reason> {
        let own = self.own().ok_or(Reason::NoUplink)?;
        if arp.sender_mac.is_group() || arp.sender == own {
            return Err(Reason::Source);
        }
        if let Some((mut waited, info)) = self.neighbours.learn(arp.sender, arp.sender_mac, now_ns) {
            put(&mut waited, 0, arp.sender_mac.0).ok_or(Reason::Malformed)?;
            out.to_uplink(&waited, info);
        }
        if arp.operation == 1 && arp.target == own {
            self.send_arp(2, own, (arp.sender_mac, arp.sender), arp.sender_mac, out);
        }
        Ok(())
    }

    /// Takes an ICMP error: if it is about a packet of a flow, the guest gets it, as if its own packet were quoted.
    fn uplink_error(&mut self, frame: &mut [u8], ip: &Ipv4, now_ns: u64, out: &mut dyn Output) -> Result<(), Reason> {
        if ip.end - ip.at > usize::from(self.settings.mtu) {
            return Err(Reason::TooLong);
        }
        let quoted = quoted(frame, ip)?;
        if Some(quoted.source) != self.own() {
            return Err(Reason::NoFlow);
        }
        let found = self.translator.behind_error(&self.guests, &quoted, now_ns);
        let (port, address, own_port) = found.ok_or(Reason::NoFlow)?;
        let inside = Change { end: End::Source, address, port: own_port, id: None };
        requote(frame, ip, &quoted, &inside).ok_or(Reason::Malformed)?;
        let change = Change { end: End::Destination, address, port: 0, id: None };
        // The error has no port that could be replaced.
        let bare = Ipv4 { transport: None, ..*ip };
        self.deliver(port, frame, &bare, &change, OWN, out)
    }

    /// Gives a packet from outside to the guest it is for.
    fn deliver(
        &self,
        port: PortId,
        frame: &mut [u8],
        ip: &Ipv4,
        change: &Change,
        info: FrameInfo,
        out: &mut dyn Output,
    ) -> Result<(), Reason> {
        let mac = self.guests.get(port).ok_or(Reason::NoFlow)?.mac;
        if crate::bytes::byte(frame, ip.at + 8).is_none_or(|hops| hops <= 1) {
            return Err(Reason::Hops);
        }
        rewrite(frame, ip, change, info.checksum).ok_or(Reason::Malformed)?;
        put(frame, 0, mac.0).ok_or(Reason::Malformed)?;
        put(frame, 6, self.settings.mac.0).ok_or(Reason::Malformed)?;
        out.to_guest(port, frame, info);
        Ok(())
    }
}
